"""Perplexity equals a loop that runs the model once for every token, on exactly the context the definition gives it."""

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralForCausalLM

from moe_ext.evaluation.perplexity import perplexity
from tests.support.letters import POSITIONS, contexts, documents, letter_tokenizer, small_mixtral, window_and_stride

# Losses near log(9); logits in float32 carry about 2^-24 * H = 2^-20 of relative error, in another order when batched.
TOLERANCE = 1e-5


TOKENIZER = letter_tokenizer(bos=False)
MODEL = small_mixtral()


@torch.no_grad()
def naive_losses(model: MixtralForCausalLM, tokens: Sequence[int], window: int, stride: int) -> list[float]:
    """Negative log-likelihoods in float64, from one run of the model a token."""
    losses = []
    for start, target in contexts(len(tokens), window, stride):
        logits = model(torch.tensor([tokens[start:target]])).logits[0, -1].double()
        losses.append(-logits.log_softmax(-1)[tokens[target]].item())
    return losses


def naive_perplexity(model: MixtralForCausalLM, texts: Sequence[str], window: int, stride: int) -> float:
    per_document = [naive_losses(model, TOKENIZER(text)["input_ids"], window, stride) for text in texts]
    losses = list(itertools.chain.from_iterable(per_document))
    return math.exp(math.fsum(losses) / len(losses))


def test_the_reference_gives_every_token_the_promised_context() -> None:
    assert list(contexts(7, window=4, stride=2)) == [(0, 1), (0, 2), (0, 3), (0, 4), (2, 5), (2, 6)]
    assert list(contexts(8, window=4, stride=2)) == [(0, 1), (0, 2), (0, 3), (0, 4), (2, 5), (2, 6), (3, 7)]
    for window in range(1, 8):
        for stride in range(1, window + 1):
            lengths = [target - start for start, target in contexts(30, window, stride)]
            assert lengths[:window] == list(range(1, window + 1))
            assert all(window - stride + 1 <= length <= window for length in lengths[window:])


@settings(max_examples=12)
@given(texts=documents, sizes=window_and_stride(), batch_size=st.integers(1, 5))
def test_perplexity_equals_a_loop_over_single_tokens(texts: list[str], sizes: tuple[int, int], batch_size: int) -> None:
    window, stride = sizes
    found = perplexity(MODEL, {"d": texts}, TOKENIZER, window=window, stride=stride, batch_size=batch_size)
    assert found.per_domain["d"] == pytest.approx(naive_perplexity(MODEL, texts, window, stride), rel=TOLERANCE)


@settings(max_examples=25)
@given(texts=documents, sizes=window_and_stride())
def test_every_token_but_a_documents_first_is_scored_once(texts: list[str], sizes: tuple[int, int]) -> None:
    found = perplexity(MODEL, {"d": texts}, TOKENIZER, window=sizes[0], stride=sizes[1])
    assert found.tokens == {"d": sum(map(len, texts)) - len(texts)}


@settings(max_examples=8)
@given(texts=documents, sizes=window_and_stride())
def test_batching_changes_nothing(texts: list[str], sizes: tuple[int, int]) -> None:
    window, stride = sizes
    single, batched = (
        perplexity(MODEL, {"d": texts}, TOKENIZER, window=window, stride=stride, batch_size=size) for size in (1, 8)
    )
    assert batched.per_domain["d"] == pytest.approx(single.per_domain["d"], rel=TOLERANCE)


@pytest.mark.parametrize("padding", [0, 3, 8])
def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch, padding: int) -> None:
    forward = MODEL.forward

    def forward_with_other_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor, **arguments: Any) -> Any:
        return forward(input_ids.masked_fill(attention_mask == 0, padding), attention_mask, **arguments)

    texts = ["abcdefghabcdefgh", "hg", "cba"]  # the last two are padded to the first
    monkeypatch.setattr(MODEL, "forward", forward_with_other_padding)
    found = perplexity(MODEL, {"d": texts}, TOKENIZER, window=16)
    monkeypatch.undo()
    assert found.per_domain["d"] == pytest.approx(naive_perplexity(MODEL, texts, 16, 8), rel=TOLERANCE)


def test_the_mean_is_geometric_over_domains() -> None:
    found = perplexity(MODEL, {"short": "abc", "long": "hgfedcbahgfedcba"}, TOKENIZER, window=8)
    assert found.mean == pytest.approx(math.sqrt(found.per_domain["short"] * found.per_domain["long"]))


def test_one_text_is_one_document() -> None:
    assert perplexity(MODEL, {"d": "abcd"}, TOKENIZER, window=8) == perplexity(
        MODEL, {"d": ["abcd"]}, TOKENIZER, window=8
    )


def test_documents_do_not_see_each_other() -> None:
    apart = perplexity(MODEL, {"d": ["abcd", "efgh"]}, TOKENIZER, window=8)
    assert apart.tokens == {"d": 6}
    assert apart.per_domain["d"] == pytest.approx(
        math.sqrt(naive_perplexity(MODEL, ["abcd"], 8, 4) * naive_perplexity(MODEL, ["efgh"], 8, 4)), rel=TOLERANCE
    )


def test_a_tokenizer_that_prepends_bos_has_the_first_letter_scored() -> None:
    found = perplexity(MODEL, {"d": "a"}, letter_tokenizer(bos=True), window=8)
    assert found.tokens == {"d": 1}
    logits = MODEL(torch.tensor([[0]])).logits[0, -1].double()
    assert found.per_domain["d"] == pytest.approx(1 / logits.softmax(-1)[1].item(), rel=TOLERANCE)


def test_half_the_window_is_the_default_stride() -> None:
    text = "abcdefghhgfedcbaaabbccddee"
    found = perplexity(MODEL, {"d": text}, TOKENIZER, window=10)
    assert found == perplexity(MODEL, {"d": text}, TOKENIZER, window=10, stride=5)
    assert found != perplexity(MODEL, {"d": text}, TOKENIZER, window=10, stride=10)


def test_a_window_of_one_token_has_a_default_stride() -> None:
    assert perplexity(MODEL, {"d": "abc"}, TOKENIZER, window=1).tokens == {"d": 2}


def test_a_bfloat16_models_logits_are_normalised_in_float32() -> None:
    model = small_mixtral()
    model.bfloat16()
    tokens = torch.tensor([TOKENIZER("abcdefgh")["input_ids"]])
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    assert logits.dtype == torch.bfloat16
    expected = torch.nn.functional.cross_entropy(logits[0].double(), tokens[0, 1:]).exp().item()
    found = perplexity(model, {"d": "abcdefgh"}, TOKENIZER, window=8)
    assert found.per_domain["d"] == pytest.approx(expected, rel=TOLERANCE)


def test_it_works_inside_inference_mode() -> None:
    outside = perplexity(MODEL, {"d": "abcdefgh"}, TOKENIZER, window=8)
    with torch.inference_mode():
        assert perplexity(MODEL, {"d": "abcdefgh"}, TOKENIZER, window=8) == outside


def test_the_model_runs_without_gradients_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_mixtral().train()
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    perplexity(model, {"d": "abc"}, TOKENIZER, window=8)
    assert seen == [(False, False)]


def test_every_modules_training_mode_is_restored() -> None:
    model = small_mixtral().train()
    model.model.layers[0].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    perplexity(model, {"d": "abc"}, TOKENIZER, window=8)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_the_training_mode_is_restored_after_an_interruption() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = small_mixtral().train()
    model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        perplexity(model, {"d": "abc"}, TOKENIZER, window=8)
    assert all(module.training for module in model.modules())


def test_nan_logits_show_in_the_perplexity() -> None:
    model = small_mixtral()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    assert math.isnan(perplexity(model, {"d": "abc"}, TOKENIZER, window=8).mean)


def test_a_perplexity_beyond_float_range_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    hopeless = torch.zeros(1, 2, 9)
    hopeless[..., 0] = 1000  # a loss of 1000 nats for every other token
    monkeypatch.setattr(MODEL, "forward", lambda **_: SimpleNamespace(logits=hopeless))
    assert perplexity(MODEL, {"d": "abc"}, TOKENIZER, window=8).mean == math.inf


def test_a_progress_bar_appears_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    perplexity(MODEL, {"d": "abc"}, TOKENIZER, window=8)
    assert capsys.readouterr() == ("", "")
    perplexity(MODEL, {"d": "abc"}, TOKENIZER, window=8, progress=True)
    assert "1/1" in capsys.readouterr().err


def test_a_long_document_draws_no_warning_about_its_length(caplog: pytest.LogCaptureFixture) -> None:
    perplexity(MODEL, {"d": "ab" * POSITIONS}, letter_tokenizer(bos=False), window=8)
    assert not caplog.records


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "texts: expected one or more domains, got none"),
        ({"d": []}, "texts: domain 'd' has no documents"),
        ({"d": ""}, "texts: 'd', document 0: expected 2 or more tokens, got 0"),
        ({"c": "abc", "d": ["abc", "a"]}, "texts: 'd', document 1: expected 2 or more tokens, got 1"),
    ],
)
def test_texts_with_nothing_to_score_are_refused(texts: dict[str, str | list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(MODEL, texts, TOKENIZER, window=8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "window: expected 1 to max_position_embeddings = 32 tokens, got 512"),
        ({"window": 33}, "window: expected 1 to max_position_embeddings = 32 tokens, got 33"),
        ({"window": 0}, "window: expected 1 to max_position_embeddings = 32 tokens, got 0"),
        ({"window": 8, "stride": 0}, "stride: expected 1 to window = 8, got 0"),
        ({"window": 8, "stride": 9}, "stride: expected 1 to window = 8, got 9"),
        ({"window": 8, "batch_size": 0}, "batch_size: expected 1 or more, got 0"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(MODEL, {"d": "abc"}, TOKENIZER, **sizes)  # type: ignore[arg-type]


def test_a_tokenizer_of_another_model_is_refused() -> None:
    model = small_mixtral()
    model.resize_token_embeddings(5)
    with pytest.raises(ValueError, match="expected tokens from 0 and below the model's vocabulary size 5, got 8"):
        perplexity(model, {"d": "abch"}, TOKENIZER, window=8)
