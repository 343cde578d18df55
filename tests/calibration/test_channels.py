"""Sums over channels, against float64 brute force on the family's own modules."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import moe_ext
from moe_ext.calibration.removal_order import removal_order
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.models.blocks import expert_tensors, moe_blocks
from moe_ext.models.expert_width import width_of
from moe_ext.runtime.formulas import experts_layer
from tests.support.families import ALL, STOCK_ONLY, build, experts_case_of, on_devices, on_experts
from tests.support.reference import ExpertsCase, between

FAMILIES = [name for name in ALL if name not in STOCK_ONLY]


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[1, 6:] = 0
        made.append({"input_ids": torch.randint(3, 96, (2, 9), generator=generator), "attention_mask": mask})
    return made


Hook = Callable[[int, nn.Module, tuple[Tensor, ...], Tensor], None]
"""Called with a layer, its experts, what they are given, and which tokens count (T,)."""


def look(model: PreTrainedModel, text: list[dict[str, Tensor]], hook: Hook) -> None:
    """Runs a model over text, and a hook before every layer's experts."""
    counted = torch.ones(0, dtype=torch.bool)
    handles = on_experts(model, lambda layer, module, args: hook(layer, module, args, counted))
    with torch.no_grad():
        for batch in text:
            counted = batch["attention_mask"].reshape(-1).bool()
            model.base_model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()


def hidden_of(case: ExpertsCase, expert: int, token: int) -> tuple[Tensor, Tensor]:
    """h (I,) of an expert for a token, and its down projection (H, I), in float64."""
    rows, bias, down, _ = case.projections(expert)
    products = rows @ case.x[token].double() + bias
    return between(case, products, torch.zeros_like(products))[0], down


def brute_force(model: PreTrainedModel, text: list[dict[str, Tensor]]) -> Tensor:
    """(L, E, I): sum over routed, counted tokens of g^2 h_j^2 ||down[:, j]||^2, from the definitions."""
    blocks = moe_blocks(model)
    width = width_of(blocks[0])
    errors = torch.zeros(len(blocks), blocks[0].num_experts, width, dtype=torch.float64)

    def hook(layer: int, module: nn.Module, args: tuple[Tensor, ...], counted: Tensor) -> None:
        x, experts, weights = args
        case = experts_case_of(module, x, experts, weights)
        for token in counted.nonzero().flatten().tolist():
            for expert, weight in zip(experts[token].tolist(), weights[token].double().tolist(), strict=True):
                h, down = hidden_of(case, expert, token)
                errors[layer, expert] += (weight * h) ** 2 * down.square().sum(0)

    look(model, text, hook)
    return errors


def gram_of(model: PreTrainedModel, text: list[dict[str, Tensor]], layer: int, expert: int) -> Tensor:
    """(I, I): sum over routed, counted tokens of g^2 h h^T of one expert, from the definition."""
    width = width_of(moe_blocks(model)[layer])
    gram = torch.zeros(width, width, dtype=torch.float64)

    def hook(seen: int, module: nn.Module, args: tuple[Tensor, ...], counted: Tensor) -> None:
        _, experts, weights = args
        for token, slot in ((experts == expert) & counted[:, None]).nonzero().tolist() if seen == layer else ():
            h = weights[token, slot].double() * hidden_of(experts_case_of(module, *args), expert, token)[0]
            gram.addr_(h, h)

    look(model, text, hook)
    return gram


@pytest.mark.parametrize(("family", "device"), on_devices(FAMILIES))
def test_errors_of_channels_equal_float64_brute_force(family: str, device: str) -> None:
    model = build(family)
    expected = brute_force(model, batches())
    model.to(device)
    stats = moe_ext.calibrate(model, batches(), channels="energy", progress=False)
    assert stats.channel_errors is not None
    torch.testing.assert_close(stats.channel_errors, expected, rtol=1e-3, atol=1e-7)
    assert torch.equal(stats.moments, moe_ext.calibrate(model, batches(), progress=False).moments)


def test_norms_are_those_of_the_weights() -> None:
    model = build("mixtral", dtype=torch.bfloat16)
    stats = moe_ext.calibrate(model, batches(), channels="energy", progress=False)
    assert stats.channel_norms is not None
    for layer, block in enumerate(moe_blocks(model)):
        up = expert_tensors(block)["gate_up_proj"].double()[:, stats.channel_norms.shape[2] :]
        expected = up.square().sum(2).sqrt() * expert_tensors(block)["down_proj"].double().square().sum(1).sqrt()
        torch.testing.assert_close(stats.channel_norms[layer], expected)


def assert_same(first: ExpertStatistics, second: ExpertStatistics) -> None:
    assert first.tensors().keys() == second.tensors().keys()
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


def test_a_folder_gives_the_same_a_file_holds_it_and_halves_add_up(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "model")
    whole = moe_ext.calibrate(model, batches(), channels="energy", progress=False)
    resume = tmp_path / "partial"
    assert_same(
        moe_ext.calibrate(tmp_path / "model", batches(), channels="energy", progress=False, resume=resume), whole
    )
    whole.save(tmp_path / "stats.safetensors")
    assert_same(ExpertStatistics.load(tmp_path / "stats.safetensors"), whole)
    halves = [moe_ext.calibrate(model, [batch], channels="energy", progress=False) for batch in batches()]
    both = halves[0] + halves[1]
    assert whole.channel_errors is not None
    assert both.channel_errors is not None
    torch.testing.assert_close(both.channel_errors, whole.channel_errors, rtol=1e-12, atol=0)
    assert torch.equal(both.channel_norms, whole.channel_norms)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is of another run"):
        moe_ext.calibrate(tmp_path / "model", batches(), progress=False, resume=resume)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel_errors": None, "channel_norms": None}, "one of the two has channel_errors and the other has none"),
        ({"channel_norms": torch.zeros(3, 8, 24).double()}, "the norms of the weights differ"),
        (
            {"channel_errors": torch.zeros(3, 8, 23).double(), "channel_norms": torch.zeros(3, 8, 23).double()},
            "channel_errors has 24 and 23 dimensions",
        ),
    ],
)
def test_channels_of_another_model_do_not_add_up(change: dict[str, Any], message: str) -> None:
    stats = moe_ext.calibrate(build("mixtral"), batches(), channels="energy", progress=False)
    other = ExpertStatistics(stats.layout, stats.gate, "", **{**stats.tensors(), **change})
    with pytest.raises(ValueError, match=message):
        stats.merge(other)


def test_errors_without_norms_are_no_statistics() -> None:
    stats = moe_ext.calibrate(build("mixtral"), batches(), channels="energy", progress=False)
    with pytest.raises(ValueError, match="channel_norms: expected with channel_errors"):
        ExpertStatistics(stats.layout, stats.gate, "", **{**stats.tensors(), "channel_norms": None})  # type: ignore[arg-type]


def test_what_cannot_be_observed_is_refused() -> None:
    with pytest.raises(ValueError, match="channels: expected one of energy, gram, or None, got 'all'"):
        moe_ext.calibrate(build("mixtral"), batches(), channels="all", progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"observed by the operators only; model.layers.0.mlp: MixtralExperts: its"):
        moe_ext.calibrate(
            build("mixtral", hidden_act="relu"), batches(), channels="energy", strict=False, progress=False
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_channels_is_that_of_the_gram_matrices(family: str) -> None:
    model = build(family)
    stats = moe_ext.calibrate(model, batches(), channels="gram", progress=False)
    plain = moe_ext.calibrate(model, batches(), channels="energy", progress=False)
    assert stats.channel_order is not None
    for name, tensor in plain.tensors().items():
        assert torch.equal(stats.tensors()[name], tensor), name
    reached = stats.routing_counts() > 0
    for layer, block in enumerate(moe_blocks(model)):
        for expert in (int(reached[layer].long().argmax()), int(reached[layer].long().argmin())):
            down = experts_layer(block.experts).outputs(expert).detach()
            if reached[layer, expert]:
                expected = removal_order(gram_of(model, batches(), layer, expert), down)
            else:
                assert stats.channel_norms is not None
                expected = stats.channel_norms[layer, expert].argsort(stable=True)
            assert torch.equal(stats.channel_order[layer, expert].long(), expected)


def test_the_order_from_a_folder_is_that_in_memory_and_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("mixtral").save_pretrained(tmp_path / "model")
    whole = moe_ext.calibrate(build("mixtral"), batches(), channels="gram", progress=False)
    resume = tmp_path / "unfinished"
    calls = iter(range(100))

    def killed(*args: Any) -> Tensor:
        if next(calls) == 9:  # of 8 experts in each of 3 layers
            raise KeyboardInterrupt
        return removal_order(*args)

    monkeypatch.setattr("moe_ext.calibration.channels.removal_order", killed)
    with pytest.raises(KeyboardInterrupt):
        moe_ext.calibrate(tmp_path / "model", batches(), channels="gram", progress=False, resume=resume)
    monkeypatch.undo()
    got = moe_ext.calibrate(tmp_path / "model", batches(), channels="gram", progress=False, resume=resume)
    for name, tensor in whole.tensors().items():
        assert torch.equal(got.tensors()[name], tensor), name
    got.save(tmp_path / "statistics")
    loaded = ExpertStatistics.load(tmp_path / "statistics")
    assert torch.equal(loaded.tensors()["channel_order"], whole.tensors()["channel_order"])


def test_orders_do_not_merge_and_hold_every_channel_once(tmp_path: Path) -> None:
    stats = moe_ext.calibrate(build("mixtral"), batches(), channels="gram", progress=False)
    with pytest.raises(ValueError, match="other: orders of channels do not add up; calibrate both texts in one run"):
        stats.merge(stats, allow_duplicates=True)
    assert stats.channel_order is not None
    stats.channel_order[1, 2, 3] = stats.channel_order[1, 2, 4]
    with pytest.raises(ValueError, match=r"channel_order: layer .*layers.1.*, expert 2: expected every channel once"):
        stats.save(tmp_path / "statistics")


def test_a_gram_matrix_that_does_not_fit_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    free = namedtuple("free", "available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: free(18_000))
    with pytest.raises(MemoryError, match="channels: the Gram matrix of an expert with 24 channels takes"):
        moe_ext.calibrate(build("mixtral"), batches(), channels="gram", progress=False)
