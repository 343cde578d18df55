"""Plans of thinner experts: widths, the channels that are kept, files, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moe_ext.calibration.statistics import ExpertStatistics, StatisticsFileError
from moe_ext.decision.pruning_plan import PlanFileError, PruningPlan
from moe_ext.decision.thin_plan import thin_plan

LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")


def statistics(width: int = 16, unreached: bool = False) -> ExpertStatistics:
    stats = ExpertStatistics.zeros("mixtral", LAYERS, 4, 2, "softmax", "prose", width=width)
    generator = torch.Generator().manual_seed(0)
    assert stats.channel_errors is not None
    assert stats.channel_norms is not None
    stats.moments[:, :, 0, 0] = 5
    stats.channel_errors.copy_(torch.rand(stats.channel_errors.shape, generator=generator))
    stats.channel_norms.copy_(torch.rand(stats.channel_norms.shape, generator=generator))
    if unreached:
        stats.moments[1, 3, 0, 0] = 0
        stats.channel_errors[1, 3] = 0
    return stats


def with_sum(name: str, value: float) -> ExpertStatistics:
    stats = statistics()
    getattr(stats, name)[1, 2, 3] = value
    return stats


FEWER = PruningPlan("mixtral", 4, 2, LAYERS, ((0, 2), (1, 2, 3)), {"criterion": "man", "keep": 2})


@pytest.mark.parametrize("plan", [None, FEWER])
def test_every_expert_keeps_the_channels_that_contribute_most(plan: PruningPlan | None) -> None:
    stats = statistics()
    made = thin_plan(stats, channels=6, multiple=2, plan=plan)
    assert made.keep == (((0, 1, 2, 3),) * 2 if plan is None else plan.keep)
    assert made.channels is not None
    for layer, keep in enumerate(made.keep):
        for position, expert in enumerate(keep):
            errors = stats.channel_errors[layer, expert].tolist()  # type: ignore[index]
            expected = sorted(sorted(range(16), key=lambda channel: -errors[channel])[:6])
            assert made.channels.indices(layer)[position].tolist() == expected


@pytest.mark.parametrize(
    ("size", "plan", "multiple", "width"),
    [
        (0.75, None, 1, 12),
        (0.74, None, 1, 11),
        (0.75, None, 8, 8),
        (0.5, None, 4, 8),
        (0.5, FEWER, 1, 12),  # 5 of 8 experts: 0.8 of what they have
        (0.3125, FEWER, 1, 8),
    ],
)
def test_the_width_is_the_largest_multiple_within_the_size(
    size: float, plan: PruningPlan | None, multiple: int, width: int
) -> None:
    made = thin_plan(statistics(), size=size, plan=plan, multiple=multiple)
    assert made.channels is not None
    assert made.channels.width(0) == made.channels.width(1) == width
    assert made.made_by["size"] == size
    assert made.made_by["channels"] == width
    assert made.made_by.get("criterion") == (None if plan is None else "man")


@pytest.mark.parametrize("plan", [None, FEWER])
def test_channels_of_a_block_stay_or_go_together_by_their_sum(plan: PruningPlan | None) -> None:
    stats = statistics()
    made = thin_plan(stats, channels=8, multiple=2, blocks=4, plan=plan)
    assert made.channels is not None
    assert made.made_by["blocks"] == 4
    for layer, keep in enumerate(made.keep):
        for position, expert in enumerate(keep):
            errors = stats.channel_errors[layer, expert].tolist()  # type: ignore[index]
            sums = [sum(errors[4 * block : 4 * block + 4]) for block in range(4)]
            best = sorted(sorted(range(4), key=lambda block: -sums[block])[:2])
            expected = [4 * block + place for block in best for place in range(4)]
            assert made.channels.indices(layer)[position].tolist() == expected


def test_blocks_of_the_optimal_brain_surgeon_are_those_that_would_go_last() -> None:
    stats = statistics()
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(16, generator=generator) for _ in range(8)]).view(2, 4, 16)
    stats = replace(stats, channel_order=order.to(torch.int32))
    made = thin_plan(stats, channels=8, multiple=2, blocks=4, select="obs")
    assert made.channels is not None
    for layer in range(2):
        for expert in range(4):
            places = [order[layer, expert].tolist().index(channel) for channel in range(16)]
            sums = [sum(places[4 * block : 4 * block + 4]) for block in range(4)]
            best = sorted(sorted(range(4), key=lambda block: -sums[block])[:2])
            expected = [4 * block + place for block in best for place in range(4)]
            assert made.channels.indices(layer)[expert].tolist() == expected


def test_an_expert_that_no_token_reached_keeps_its_largest_weights_and_says_so() -> None:
    stats = statistics(unreached=True)
    with pytest.warns(UserWarning, match="1 experts that no token reached keep the channels with the largest weights"):
        made = thin_plan(stats, channels=5, multiple=1)
    norms = stats.channel_norms[1, 3].tolist()  # type: ignore[index]
    assert made.channels is not None
    assert made.channels.indices(1)[3].tolist() == sorted(sorted(range(16), key=lambda channel: -norms[channel])[:5])
    assert made.made_by["unreached_experts"] == 1


def test_a_file_holds_the_channels_and_one_from_before_them_is_read() -> None:
    made = thin_plan(statistics(), channels=6, multiple=2, plan=FEWER)
    assert PruningPlan.from_json(made.to_json()) == made
    old = json.loads(FEWER.to_json()) | {"format_version": 1}
    assert PruningPlan.from_json(json.dumps(old)) == FEWER
    with pytest.raises(PlanFileError, match="field 'channels' is not part of format version 1"):
        PruningPlan.from_json(json.dumps(json.loads(made.to_json()) | {"format_version": 1}))
    channels = json.loads(made.to_json())["channels"]
    channels["kept"][0].pop()
    with pytest.raises(PlanFileError, match="channels: expected those of every expert that is kept"):
        PruningPlan.from_json(json.dumps(json.loads(made.to_json()) | {"channels": channels}))


@pytest.mark.parametrize(
    ("stats", "options", "message"),
    [
        (statistics(), {}, "size: expected exactly one of .* got size=None, channels=None, fit=None"),
        (statistics(), {"size": 0.5, "channels": 8}, "size: expected exactly one"),
        (statistics(), {"size": 0.5, "fit": "1GB", "model": "folder"}, "size: expected exactly one"),
        (statistics(), {"channels": 8, "fit": 1000, "model": "folder"}, "size: expected exactly one"),
        (statistics(), {"fit": "1GB"}, "model: expected with fit, and only then"),
        (statistics(), {"size": 0.5, "model": "folder"}, "model: expected with fit, and only then"),
        *(
            (statistics(), {"fit": fit, "model": "folder"}, "fit: expected a number of bytes")
            for fit in ("48", "48 G", "-1GB", "1e3GB", "many", "0.1B", "48XB", "1.5.2GB", 0, -5, True, 1.5)
        ),
        (statistics(), {"channels": 8, "blocks": 0}, "blocks: expected 1 or more, got 0"),
        (statistics(), {"channels": 8, "blocks": 3}, "blocks: expected a divisor of the 16 channels .* got 3"),
        (statistics(), {"channels": 4, "multiple": 1, "blocks": 8}, "channels: expected a multiple of 8 .* got 4"),
        (statistics(), {"size": 0.4, "multiple": 3, "blocks": 4}, "leaves fewer than 12 of 16 channels"),
        (statistics(), {"size": 1.0}, r"size: expected a share in \(0, 1\), got 1.0"),
        (statistics(), {"size": 0.5}, "leaves fewer than 64 of 16 channels"),
        (statistics(), {"size": 0.7, "plan": FEWER, "multiple": 1}, "no less than what the kept experts have, 0.625"),
        (statistics(), {"channels": 6, "multiple": 4}, "channels: expected a multiple of 4 .* below 16, got 6"),
        (statistics(), {"channels": 16, "multiple": 4}, "below 16, got 16"),
        (statistics(), {"channels": True, "multiple": 1}, "below 16, got True"),
        (statistics(), {"size": 0.5, "multiple": 0}, "multiple: expected 1 or more, got 0"),
        (
            replace(statistics(), channel_errors=None, channel_norms=None),
            {"size": 0.5},
            r'stats: hold no sums over channels; calibrate\(..., channels="energy"\), or --channels energy',
        ),
        *(
            (
                with_sum(name, value),
                {"size": 0.5, "multiple": 1},
                rf"stats: {name} of layer '{LAYERS[1]}', expert 2, channel 3 is {value}; expected a finite number",
            )
            for name in ("channel_errors", "channel_norms")
            for value in (float("nan"), float("inf"))
        ),
        (statistics(), {"size": 0.5, "plan": replace(FEWER, top_k=1)}, "plan: is for another model .*: top_k 1 and 2"),
        (
            statistics(),
            {"size": 0.5, "plan": thin_plan(statistics(), channels=6, multiple=2)},
            "plan: says already which channels are kept",
        ),
    ],
)
def test_what_makes_no_plan_is_refused(stats: ExpertStatistics, options: dict[str, Any], message: str) -> None:
    before = {name: tensor.clone() for name, tensor in stats.tensors().items()}
    with pytest.raises(ValueError, match=message):
        thin_plan(stats, **options)
    same = {
        name: torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in stats.tensors().items()
    }
    assert all(same.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["channel_errors", "channel_norms"])
def test_sums_that_cannot_be_are_neither_written_nor_read(name: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    statistics().save(path)
    before, message = (
        path.read_bytes(),
        rf"{name}: layer '{LAYERS[1]}' holds {value} at \[2, 3\]; expected finite values",
    )
    with pytest.raises(ValueError, match=message):
        with_sum(name, value).save(path)
    assert path.read_bytes() == before
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(with_sum(name, value).tensors(), path, metadata)
    with pytest.raises(StatisticsFileError, match=message):
        ExpertStatistics.load(path)


def test_a_layer_that_lost_experts_already_is_refused() -> None:
    stats = ExpertStatistics.zeros("mixtral", LAYERS, (4, 3), 2, "softmax", width=16)
    with pytest.raises(ValueError, match="the layers differ in experts already"):
        thin_plan(stats, size=0.5, multiple=1)
