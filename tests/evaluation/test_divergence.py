"""KL divergence and agreement equal a loop over single tokens in float64; a file of predictions stands for a model."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_ext.evaluation.windows
from moe_ext.evaluation.divergence import divergence
from moe_ext.evaluation.perplexity import perplexity
from moe_ext.evaluation.predictions import PredictionsFileError, StoredPredictions, save_predictions
from tests.support.letters import contexts, documents, letter_tokenizer, small_mixtral, window_and_stride

TOKENIZER = letter_tokenizer(bos=False)
MODEL, REFERENCE = small_mixtral(1).double(), small_mixtral(2).double()
for each in (MODEL, REFERENCE):
    each.set_experts_implementation("eager")  # the others have no float64
TEXTS = {"d": ["abcdefghabcdefgh", "hg", "cba"], "e": ["hgfedcbaabcd"]}


@torch.no_grad()
def naive(texts: Sequence[str], window: int, stride: int) -> tuple[float, float]:
    """Mean KL divergence and share of agreements, from one run of both models a token."""
    terms, same = [], []
    for text in texts:
        tokens = TOKENIZER(text)["input_ids"]
        for start, target in contexts(len(tokens), window, stride):
            q, p = (
                model(torch.tensor([tokens[start:target]])).logits[0, -1].softmax(-1).tolist()
                for model in (MODEL, REFERENCE)
            )
            terms.append(math.fsum(b * math.log(b / a) for a, b in zip(q, p, strict=True)))
            same.append(q.index(max(q)) == p.index(max(p)))
    return math.fsum(terms) / len(terms), sum(same) / len(same)


@settings(max_examples=12)
@given(texts=documents, sizes=window_and_stride(), batch_size=st.integers(1, 5))
def test_divergence_equals_a_loop_over_single_tokens(texts: list[str], sizes: tuple[int, int], batch_size: int) -> None:
    window, stride = sizes
    found = divergence(MODEL, REFERENCE, {"d": texts}, TOKENIZER, window=window, stride=stride, batch_size=batch_size)
    kl, same = naive(texts, window, stride)
    # The models are float64, too: 2^-52 of logits of about 10, summed over a context, leaves 1e-13.
    assert found.kl["d"] == pytest.approx(kl, rel=1e-10)
    assert found.top1["d"] == same
    assert found.perplexity.tokens == {"d": sum(map(len, texts)) - len(texts)}


def test_the_perplexities_are_those_of_perplexity_and_domains_weigh_the_same() -> None:
    options: dict[str, Any] = {"window": 8, "stride": 3, "batch_size": 2}
    found = divergence(MODEL, REFERENCE, TEXTS, TOKENIZER, **options)
    assert found.perplexity == perplexity(MODEL, TEXTS, TOKENIZER, **options)
    assert found.reference_perplexity == perplexity(REFERENCE, TEXTS, TOKENIZER, **options)
    assert found.mean_kl == pytest.approx((found.kl["d"] + found.kl["e"]) / 2)
    assert found.mean_top1 == pytest.approx((found.top1["d"] + found.top1["e"]) / 2)
    assert found.reference_parameters == REFERENCE.num_parameters()


def test_a_model_does_not_diverge_from_itself() -> None:
    found = divergence(MODEL, MODEL, TEXTS, TOKENIZER, window=8)
    assert (found.mean_kl, found.mean_top1) == (0.0, 1.0)
    assert not MODEL.training


def test_pieces_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = divergence(MODEL, REFERENCE, TEXTS, TOKENIZER, window=8)
    save_predictions(REFERENCE, TEXTS, TOKENIZER, tmp_path / "whole", window=8)
    monkeypatch.setattr(moe_ext.evaluation.windows, "PIECE", 20)  # two rows of nine
    found = divergence(MODEL, REFERENCE, TEXTS, TOKENIZER, window=8)
    save_predictions(REFERENCE, TEXTS, TOKENIZER, tmp_path / "pieces", window=8)
    assert found.kl == pytest.approx(expected.kl, rel=1e-12)
    assert (found.top1, found.perplexity) == (expected.top1, expected.perplexity)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def gives(monkeypatch: pytest.MonkeyPatch, model: Any, logits: list[float]) -> None:
    def forward(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.tensor(logits).expand(*input_ids.shape, -1))

    monkeypatch.setattr(model, "forward", forward)


@pytest.mark.parametrize(
    ("model", "reference", "expected"),
    [
        ([0.0] * 9, [0.0] * 3 + [-math.inf] * 6, math.log(3)),  # what the reference excludes adds nothing
        ([0.0] * 3 + [-math.inf] * 6, [0.0] * 9, math.inf),
        ([math.nan] + [0.0] * 8, [0.0] * 9, math.nan),
        ([0.0] * 9, [math.nan] + [0.0] * 8, math.nan),
    ],
)
def test_logits_without_a_distribution_show(
    model: list[float], reference: list[float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gives(monkeypatch, MODEL, model)
    gives(monkeypatch, REFERENCE, reference)
    found = divergence(MODEL, REFERENCE, {"d": "abc"}, TOKENIZER, window=8)
    assert found.mean_kl == pytest.approx(expected, nan_ok=True)


def test_of_equally_likely_tokens_the_first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    gives(monkeypatch, MODEL, [0.0, 1.0, 1.0] + [0.0] * 6)
    gives(monkeypatch, REFERENCE, [0.0, 1.0, 0.0] + [1.0] * 6)
    assert divergence(MODEL, REFERENCE, {"d": "abc"}, TOKENIZER, window=8).mean_top1 == 1.0


def test_vocabularies_that_differ_are_refused(tmp_path: Path) -> None:
    other = small_mixtral()
    other.resize_token_embeddings(12)
    save_predictions(other, TEXTS, TOKENIZER, tmp_path / "file", window=8)
    for reference in (other, tmp_path / "file"):
        with pytest.raises(ValueError, match="reference: predicts 12 tokens, the model 9; expected one vocabulary"):
            divergence(MODEL, reference, TEXTS, TOKENIZER, window=8)


@settings(max_examples=8)
@given(texts=documents, sizes=window_and_stride(), batch_sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_a_file_stands_for_the_reference(
    texts: list[str], sizes: tuple[int, int], batch_sizes: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file, (window, stride) = tmp_path_factory.mktemp("predictions") / "file", sizes
    given_texts = {"other": ["hgab"], "d": texts}
    saved = save_predictions(
        REFERENCE, given_texts, TOKENIZER, file, window=window, stride=stride, batch_size=batch_sizes[0]
    )
    options: dict[str, Any] = {"window": window, "stride": stride, "batch_size": batch_sizes[1]}
    found = divergence(MODEL, file, {"d": texts}, TOKENIZER, **options)  # of the second of its domains
    live = divergence(MODEL, REFERENCE, {"d": texts}, TOKENIZER, **options)
    assert found.top1 == live.top1
    assert found.perplexity == live.perplexity
    assert found.reference_perplexity.per_domain["d"] == pytest.approx(saved.per_domain["d"], rel=1e-12)
    assert found.reference_perplexity.per_domain["d"] == pytest.approx(
        live.reference_perplexity.per_domain["d"], rel=1e-6
    )  # the losses are float32
    assert found.reference_parameters == REFERENCE.num_parameters()
    # float16 moves log p by at most 2^-11 |log p|, so that p log(p / q) moves by p |log p| (|log p| + |log q|) 2^-11.
    assert found.kl["d"] == pytest.approx(live.kl["d"], rel=0.02, abs=1e-5)


def test_a_file_has_the_size_that_is_said_and_the_same_bytes_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        save_predictions(REFERENCE, TEXTS, TOKENIZER, tmp_path / name, window=8, progress=True)
    content = (tmp_path / "one").read_bytes()
    tokens = sum(len(text) - 1 for documents in TEXTS.values() for text in documents)
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + tokens * (2 * 9 + 8)
    assert content == (tmp_path / "two").read_bytes()
    assert f"{tokens * (2 * 9 + 8) / 1e6:.1f} MB of predictions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "sizes", "says"),
    [
        ({"d": TEXTS["d"]}, {"window": 9}, "made with window 8 and stride 4; expected 9 and 4"),
        ({"d": TEXTS["d"]}, {"window": 8, "stride": 3}, "made with window 8 and stride 4; expected 8 and 3"),
        ({"d": ["abcdefghabcdefgh", "hg", "cbb"]}, {"window": 8}, "is of other text, or other tokens, of 'd'"),
        ({"f": TEXTS["d"]}, {"window": 8}, "holds no domain 'f'"),
    ],
)
def test_predictions_of_other_text_or_windows_are_refused(
    texts: dict[str, list[str]], sizes: dict[str, int], says: str, tmp_path: Path
) -> None:
    save_predictions(REFERENCE, TEXTS, TOKENIZER, tmp_path / "file", window=8)
    with pytest.raises(PredictionsFileError, match=says):
        divergence(MODEL, tmp_path / "file", texts, TOKENIZER, **sizes)  # type: ignore[arg-type]


def test_a_disk_too_small_is_found_before_the_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    monkeypatch.setattr(REFERENCE, "forward", None)
    with pytest.raises(OSError, match="the predictions of 29 tokens need"):
        save_predictions(REFERENCE, TEXTS, TOKENIZER, tmp_path / "file", window=8)
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_no_distribution_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gives(monkeypatch, REFERENCE, [math.nan] + [0.0] * 8)
    with pytest.raises(ValueError, match="model: its logits on 'd' are not finite"):
        save_predictions(REFERENCE, TEXTS, TOKENIZER, tmp_path / "file", window=8)
    assert list(tmp_path.iterdir()) == []


def test_log_probabilities_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    save_predictions(REFERENCE, TEXTS, TOKENIZER, file, window=8)
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    for value in (b"\x00\x7e", b"\x00\x3c"):  # NaN, 1.0
        content[begin : begin + 2] = value
        file.write_bytes(content)
        assert StoredPredictions(file).vocabulary == 9
        with pytest.raises(PredictionsFileError, match="log_probs: holds values that are no log-probabilities"):
            divergence(MODEL, file, TEXTS, TOKENIZER, window=8)
