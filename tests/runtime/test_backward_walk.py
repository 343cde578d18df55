"""Gradients for the outputs of MoE layers, layer by layer, against autograd through the whole model in float64."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_ext.models.blocks import moe_blocks
from moe_ext.runtime import head_gradients
from moe_ext.runtime.backward_walk import OutputGradients
from moe_ext.runtime.course import course_of
from moe_ext.runtime.head_gradients import Labels, check_head
from tests.support import every_family, families
from tests.support.batches import padded_batches, random_tokens
from tests.support.mixtral import MixtralFactory

Batches = list[dict[str, Tensor]]
Found = dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]  # by layer and batch: x, logits, gradient


def counted_in(batches: Batches) -> list[Tensor | None]:
    return [batch["attention_mask"].flatten().bool() if "attention_mask" in batch else None for batch in batches]


def walked(model: Any, batches: Batches, labels: Labels, **options: Any) -> Found:
    blocks, found = moe_blocks(model), {}
    with OutputGradients(model, blocks, batches, counted_in(batches), labels, **options) as walk:
        for layer in reversed(range(len(blocks))):

            def seen(batch: int, x: Tensor, logits: Tensor, gradient: Tensor, layer: int = layer) -> None:
                found[layer, batch] = x, logits, gradient

            walk.observe(layer, seen)
    return found


def autograd(model: Any, batch: dict[str, Tensor], labels: Tensor, counted: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of every MoE layer, the experts' input and the gradient for their output, of the cross-entropy (float64) summed
    over the tokens (B * S,) that count."""
    inputs, outputs, handles = [], [], []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        inputs.append(args[0].detach())
        outputs.append(output)

    for block in moe_blocks(model):
        handles.append(block.experts.register_forward_hook(keep))
    logits = model(**batch).logits.flatten(0, 1).double()
    (cross_entropy(logits, labels, reduction="none") * counted).sum().backward()
    for handle in handles:
        handle.remove()
    gradients = [output.grad for output in outputs]
    assert all(gradient is not None for gradient in gradients)
    return list(zip(inputs, gradients, strict=True))  # type: ignore[arg-type]


def next_tokens(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The next token of each (B * S,), and whether both are in the text."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    has_next = torch.cat([mask[:, 1:] & mask[:, :-1], torch.zeros(len(ids), 1, dtype=torch.bool)], dim=1)
    return torch.cat([ids[:, 1:], ids[:, :1]], dim=1).flatten(), has_next.flatten()


def assert_close_to_autograd(found: Found, expected: list[tuple[Tensor, Tensor]], batch: int) -> None:
    # The same operations on the same numbers, in float32 where transformers has it so (norms, the router's softmax):
    # only where gradients meet are they summed in another order.
    for layer, (x, gradient) in enumerate(expected):
        got_x, _, got = found[layer, batch]
        torch.testing.assert_close(got_x, x.reshape(got_x.shape), rtol=0, atol=0)
        scale = float(gradient.abs().max())
        assert scale > 1e-4
        torch.testing.assert_close(got, gradient.reshape(got.shape), rtol=0, atol=1e-12 * scale)


def float64(model: Any) -> Any:
    model.set_experts_implementation("eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


def test_gradients_of_the_texts_labels_equal_autograd(tiny_mixtral: MixtralFactory) -> None:
    model, batches = float64(tiny_mixtral()), padded_batches()
    found = walked(model, batches, Labels("text"))
    for index, batch in enumerate(batches):
        assert_close_to_autograd(found, autograd(model, batch, *next_tokens(batch)), index)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "minimax", "deepseek_v3"])
def test_gradients_in_other_families_equal_autograd(family: str) -> None:
    # granitemoe scales its logits, deepseek_v3 has a dense layer first and shared experts.
    model = float64(families.build(family))
    batches = [{"input_ids": random_tokens(2, 9)}]
    found = walked(model, batches, Labels("text"))
    assert_close_to_autograd(found, autograd(model, batches[0], *next_tokens(batches[0])), 0)


@pytest.mark.parametrize("family", ["glm_moe_dsa", "hy_v4"])
def test_gradients_equal_autograd_where_layers_hand_on_which_tokens_they_attend_to(family: str) -> None:
    layers = ["full", "shared", "shared", "full"]  # these attend to the tokens that an earlier one chose
    model = float64(every_family.build(family, index_topk=4, indexer_types=layers))
    batches = [every_family.inputs(model, 1), every_family.inputs(model, 2, (1, 7), padding=2)]
    course = course_of(model, moe_blocks(model), batches)
    assert course.pairs
    assert "returns more than hidden states" in str(course.obstacle)
    found = walked(model, batches, Labels("text"))
    for index, batch in enumerate(batches):
        assert_close_to_autograd(found, autograd(model, batch, *next_tokens(batch)), index)


def test_layers_that_hand_on_numbers_with_gradients_are_refused_in_the_first() -> None:
    model = every_family.build("zaya")
    with pytest.raises(ValueError, match=r"a ZayaDecoderLayer hands the next layer more numbers .*='reconstruction'"):
        walked(model, [every_family.inputs(model, 1)], Labels())


def test_gradients_of_sampled_labels_equal_autograd(
    tiny_mixtral: MixtralFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches, drawn = float64(tiny_mixtral()), padded_batches(), []
    sample = head_gradients._sampled

    def noted(probabilities: Tensor, uniform: Tensor) -> Tensor:
        drawn.append(sample(probabilities, uniform))
        return drawn[-1]

    monkeypatch.setattr(head_gradients, "_sampled", noted)
    found = walked(model, batches, Labels("model", seed=3))
    assert len(drawn) == len(batches)
    for index, (batch, counted) in enumerate(zip(batches, counted_in(batches), strict=True)):
        every = torch.ones(batch["input_ids"].numel(), dtype=torch.bool)  # the last token of a sequence has one, too
        expected = autograd(model, batch, drawn[index], every if counted is None else counted)
        assert_close_to_autograd(found, expected, index)


def test_samples_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    found = head_gradients._sampled(probabilities.expand(1000, -1), uniform)
    assert found.bincount(minlength=4).tolist() == pytest.approx([500, 0, 300, 200], abs=1)


def test_random_signs_have_the_second_moments_of_sampled_labels() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05], dtype=torch.float64)
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=5)), dtype=torch.float64)
    directions = head_gradients._random_direction(probabilities.expand(32, -1), signs)
    expected = torch.diag(probabilities) - probabilities[:, None] * probabilities
    torch.testing.assert_close(directions.T @ directions / 32, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["model", "kl"])
def test_a_seed_gives_the_same_gradients_and_another_one_others(tiny_mixtral: MixtralFactory, kind: Any) -> None:
    model, batches = tiny_mixtral(), padded_batches()
    first, again, other = (walked(model, batches, Labels(kind, seed)) for seed in (1, 1, 2))
    assert first.keys() == again.keys() == other.keys()
    for place in first:
        assert torch.equal(first[place][2], again[place][2])
        assert not torch.equal(first[place][2], other[place][2])


def test_a_batch_has_the_same_labels_whatever_other_batches_there_are(tiny_mixtral: MixtralFactory) -> None:
    model, batches = tiny_mixtral(), padded_batches()
    found = walked(model, batches, Labels("model"))
    alone = walked(model, batches[2:], Labels("model"), numbers=[2])
    for layer in range(3):
        assert torch.equal(alone[layer, 0][2], found[layer, 2][2])


def test_what_does_not_fit_into_memory_changes_no_bit(tiny_mixtral: MixtralFactory, tmp_path: Any) -> None:
    model, batches = tiny_mixtral(), padded_batches()
    expected = walked(model, batches, Labels())
    for got in (
        walked(model, batches, Labels(), memory=0),
        walked(model, batches, Labels(), memory=0, folder=tmp_path),
    ):
        for place, tensors in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(got[place], tensors, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_the_heads_gradient_does_not_depend_on_its_pieces(
    tiny_mixtral: MixtralFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = float64(tiny_mixtral()), padded_batches()
    expected = walked(model, batches, Labels())
    monkeypatch.setattr(head_gradients, "LOGIT_BYTES", 4 * 96 * 4)  # four tokens
    got = walked(model, batches, Labels())
    for place, (_, _, gradient) in expected.items():
        torch.testing.assert_close(got[place][2], gradient, rtol=1e-6, atol=1e-8)


def test_padding_has_no_gradient_and_changes_none(tiny_mixtral: MixtralFactory) -> None:
    model, tokens = float64(tiny_mixtral()), random_tokens(1, 9)
    padded = {
        "input_ids": torch.cat([tokens, random_tokens(1, 4, seed=5)], dim=1),
        "attention_mask": torch.tensor([[1] * 9 + [0] * 4]),
    }
    expected = walked(model, [{"input_ids": tokens}], Labels("text"))
    got = walked(model, [padded], Labels("text"))
    for layer in range(3):
        torch.testing.assert_close(got[layer, 0][2][:9], expected[layer, 0][2], rtol=1e-6, atol=1e-8)
        assert not bool(got[layer, 0][2][9:].any())


def test_every_layer_runs_forward_once_and_back_once_and_the_model_is_left_as_it_was(
    tiny_mixtral: MixtralFactory,
) -> None:
    model, batches, needed = tiny_mixtral(), padded_batches(), []
    blocks, ran = moe_blocks(model), list[str]()
    before = model(batches[2]["input_ids"]).logits
    walk = OutputGradients(
        model,
        blocks,
        batches,
        counted_in(batches),
        Labels(),
        need=lambda layer, step: needed.append((layer, step)),
        ran=ran.append,
    )
    with walk:
        walk.observe(2, lambda *seen: None)
        walk.observe(0, lambda *seen: None)
    assert needed == [(0, 1), (1, 1), (2, 1), (2, -1), (1, -1), (0, -1)]
    assert len(ran) == walk.passes() == 3 * 7
    assert torch.equal(model(batches[2]["input_ids"]).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_predicts_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="loss: 'fisher' is of predicted tokens, and a MixtralModel predicts none"):
        check_head(families.build("mixtral").model)


def test_labels_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="labels: expected one of model, text, kl, got 'teacher'"):
        Labels("teacher")  # type: ignore[arg-type]
    for seed in (-1, 2**63, 1.0, True):
        with pytest.raises(ValueError, match=r"seed: expected an integer from 0 to 2\^63 - 1"):
            Labels("model", seed)  # type: ignore[arg-type]
