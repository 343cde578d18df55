"""Malformed files for the fuzz tests: small valid ones of every format, changed at random."""

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from moe_ext.calibration.statistics import ExpertStatistics, StatisticsFileError
from moe_ext.checkpoints.stored_tensors import INDEX, SINGLE, CheckpointError, stored_tensors
from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.decision.pruning_plan import PlanFileError, PruningPlan
from moe_ext.evaluation.predictions import PredictionsFileError, StoredPredictions, save_predictions
from moe_ext.evaluation.results import VariantsFileError, read_variants
from moe_ext.evaluation.windows import Window
from moe_ext.models.config_section import (
    experts_left,
    scale_in_config,
    section_with,
    section_with_novices,
    section_with_scale,
    thresholds_in_config,
)
from moe_ext.reconstruction.result import LayerLosses, SearchFileError, SearchResult
from moe_ext.storage.formats import parse_json
from tests.support.letters import letter_tokenizer, small_mixtral

LAYERS = ("model.layers.0.mlp", "model.layers.2.mlp")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of the file, in a folder of its own.
        write: writes a valid one and what belongs to it into a folder.
        read: reads it as the package does, and what was read again from a copy that it writes into another folder.
        errors: what reading may raise.
    """

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path, Path], object]
    errors: tuple[type[Exception], ...]


def _statistics(outputs: bool) -> Callable[[Path], None]:
    """With or without what calibration was asked for beside the rest."""

    def write(folder: Path) -> None:
        optional: dict[str, Any] = {"hidden_size": 3, "width": 5} if outputs else {}
        stats = ExpertStatistics.zeros("mixtral", LAYERS, (4, 3), 2, "softmax", "text", **optional)
        generator = torch.Generator().manual_seed(0)
        for tensor in stats.tensors().values():
            tensor.copy_(torch.randint(0, 100, tensor.shape, generator=generator))
        stats.shards = ("a", "b")
        stats.save(folder / "stats.safetensors")

    return write


def _read_statistics(file: Path, elsewhere: Path) -> None:
    ExpertStatistics.load(file).save(elsewhere / "again.safetensors")
    ExpertStatistics.load(elsewhere / "again.safetensors")


PLAN = PruningPlan(
    "mixtral", 4, 2, LAYERS, ((0, 2, 3), (1, 2, 3)), {"criterion": "man", "ratio": 0.25, "exact": [True]}
)


THIN_PLAN = PruningPlan(
    "mixtral",
    4,
    2,
    LAYERS,
    ((0, 3), (1, 2, 3)),
    {"size": 0.25},
    KeptChannels(9, ((b"\xd0\x00", b"\x03\x80"), (b"\x07\x00",) * 3)),
)


def _search() -> SearchResult:
    keep = torch.tensor([[index != dropped for index in range(4)] for dropped in range(4)])
    return SearchResult(
        PLAN, tuple(LayerLosses(keep.clone(), torch.tensor([3.0, 0.5, 2.0, 0.25]).double()) for _ in LAYERS)
    )


def _read_search(file: Path, elsewhere: Path) -> None:
    found = SearchResult.load(file)
    found.layer_losses()
    for name in ("again.json", "again.safetensors"):
        found.save(elsewhere / name)
        SearchResult.load(elsewhere / name)


def _read_plan(file: Path, elsewhere: Path) -> None:
    plan = PruningPlan.load(file)
    [plan.removed(layer) for layer in range(len(plan.layers))]
    if plan.channels is not None:
        [plan.channels.indices(layer) for layer in range(len(plan.layers))]
    plan.save(elsewhere / "again.json")
    assert PruningPlan.load(elsewhere / "again.json") == plan


def _predictions(folder: Path) -> None:
    texts = {"a": "abcd", "b": ["ba", "dc"]}
    save_predictions(small_mixtral(), texts, letter_tokenizer(bos=False), folder / "p.safetensors", window=4)


def _read_predictions(file: Path, elsewhere: Path) -> None:
    stored = StoredPredictions(file)
    for domain, tokens in stored.tokens().items():
        targets = torch.zeros(tokens, dtype=torch.int64)
        list(stored.predictions(domain, 0, [Window(targets, targets)]))


def _json_file(name: str, content: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(json.dumps(content))

    return write


def _shards(folder: Path) -> None:
    _weights(folder / "model-00001-of-00002.safetensors", "a")
    _weights(folder / "model-00002-of-00002.safetensors", "b")
    weight_map = {f"{name}.{kind}": f"model-0000{number}-of-00002.safetensors"
                  for number, name in ((1, "a"), (2, "b")) for kind in ("weight", "bias")}  # fmt: skip
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 56}, "weight_map": weight_map}))


def _weights(file: Path, name: str) -> None:
    save_file({f"{name}.weight": torch.ones(2, 3), f"{name}.bias": torch.ones(2).bfloat16()}, file, {"format": "pt"})


class StoredConfig(SimpleNamespace):
    """A config of entries alone, which any JSON may be."""

    def get_text_config(self, decoder: bool = True) -> "StoredConfig":
        return self


def _read_config(file: Path, elsewhere: Path) -> None:
    config = parse_json(file.read_bytes())
    if not isinstance(config, dict):
        raise ValueError("no object")
    experts_left(config.get("moe_ext"), 3)
    scale_in_config(StoredConfig(**{name: value for name, value in config.items() if name}))
    thresholds_in_config(StoredConfig(**{name: value for name, value in config.items() if name}), [0, 2], 2)


_SECTION = section_with_scale(
    4, section_with(torch.tensor([[0.5], [0.25]]), section_with_novices({"0": 3, "2": 2}, None), [0, 2])
)
_ROW = {"checkpoint": "a", "mean": 5.5, "weight_bytes": 120, "tokens_per_second": 3.5, "perplexity": {"text": 5.5}}
_DEMO = {"rows": [{"name": "unpruned", "mean": 5.5, "file_bytes": 120, "speed": 1.0}, {"name": "6 of 8", "mean": 7,
                   "file_bytes": 90, "speed": None}]}  # fmt: skip

KINDS = {
    "statistics": Kind("stats.safetensors", _statistics(False), _read_statistics, (StatisticsFileError,)),
    "statistics with all": Kind("stats.safetensors", _statistics(True), _read_statistics, (StatisticsFileError,)),
    "plan": Kind("plan.json", lambda folder: PLAN.save(folder / "plan.json"), _read_plan, (PlanFileError,)),
    "plan of channels": Kind(
        "plan.json", lambda folder: THIN_PLAN.save(folder / "plan.json"), _read_plan, (PlanFileError,)
    ),
    "search, JSON": Kind("s.json", lambda folder: _search().save(folder / "s.json"), _read_search, (SearchFileError,)),
    "search": Kind(
        "s.safetensors", lambda folder: _search().save(folder / "s.safetensors"), _read_search, (SearchFileError,)
    ),
    "comparison": Kind("c.json", _json_file("c.json", {"checkpoints": [_ROW, {**_ROW, "checkpoint": "b"}]}),
                       lambda file, _: read_variants(file), (VariantsFileError,)),
    "evaluation": Kind("e.json", _json_file("e.json", _ROW), lambda file, _: read_variants(file), (VariantsFileError,)),
    "demo": Kind("d.json", _json_file("d.json", _DEMO), lambda file, _: read_variants(file), (VariantsFileError,)),
    "predictions": Kind("p.safetensors", _predictions, _read_predictions, (PredictionsFileError,)),
    "index": Kind(INDEX, _shards, lambda file, _: stored_tensors(file.parent), (CheckpointError, FileNotFoundError)),
    "weights": Kind(SINGLE, lambda folder: _weights(folder / SINGLE, "a"),
                    lambda file, _: stored_tensors(file.parent), (CheckpointError,)),
    "config": Kind("config.json", _json_file("config.json", {"moe_ext": _SECTION}), _read_config, (ValueError,)),
    "config of NAEE": Kind("config.json", _json_file("config.json", {"betas": {"0": 0.5, "1": 0.25}}), _read_config,
                           (ValueError,)),
}  # fmt: skip


def malform(file: Path, chance: random.Random) -> None:
    """Changes a valid file in one to three ways, so that it is most likely malformed."""
    for _ in range(chance.randint(1, 3)):
        content = file.read_bytes()
        if chance.random() < 0.3:
            content = _changed_bytes(content, chance)
        elif file.suffix == ".safetensors":
            content = _changed_tensors(content, chance)
        else:
            content = _changed_json(content, chance)
        file.write_bytes(content)


_BAD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**53, 2**63, 2**64, 10**400, 10**4000, -0.5, 0.5, 1e308, 5e-324,
    float("nan"), float("inf"), "", "x" * 100_000, "\ud800", "[/b]", "$\\frac{$", "; font-family: ", "../x", "\0", "1",
    [], [[]], {}, [1, 1], [-1], [True], ["a"], {"a": 1}, list(range(5000)), "moe_ext.search", "F32", "F8_E8M0", "C64",
]  # fmt: skip


def _changed_json(content: bytes, chance: random.Random) -> bytes:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _changed_bytes(content, chance)
    value = _changed(value, chance)
    text = json.dumps(value, ensure_ascii=chance.random() < 0.8)
    if chance.random() < 0.1:  # a name twice
        text = text.replace("{", '{"format": 1, "format": 2, ' if chance.random() < 0.5 else '{"a": 1, "a": 2, ', 1)
    return text.encode(errors="surrogatepass")


def _changed(value: Any, chance: random.Random) -> Any:
    """A JSON value with one node replaced, removed, doubled or renamed."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        if isinstance(value, str) and chance.random() < 0.5:  # a metadata string may be JSON itself
            return _changed_json(value.encode(errors="replace"), chance).decode(errors="replace")
        return chance.choice(_BAD)
    if isinstance(value, list):
        index = chance.randrange(len(value))
        match chance.randrange(5):
            case 0:
                return value[:index] + value[index + 1 :]
            case 1:
                return [*value, value[index]]
            case 2:
                return value[::-1]
            case _:
                return [*value[:index], _changed(value[index], chance), *value[index + 1 :]]
    name = chance.choice(list(value))
    match chance.randrange(8):
        case 0:
            return {key: each for key, each in value.items() if key != name}
        case 1:
            return {**value, str(chance.choice(_BAD))[:1000]: value[name]}
        case 2:
            return {(f"{key}x" if key == name else key): each for key, each in value.items()}
        case _:
            return {**value, name: _changed(value[name], chance)}


def _changed_tensors(content: bytes, chance: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], bytearray(content[8 + length :])
    if chance.random() < 0.3 and len(data) >= 8:  # a number that cannot be
        bad = chance.choice([float("nan"), float("inf"), -1.0, 1e300, 2.0**60])
        packed = (
            struct.pack("<d", bad)
            if chance.random() < 0.5
            else struct.pack("<q", chance.choice([-1, 2**62, 2**63 - 1]))
        )
        place = chance.randrange(len(data) // 8) * 8
        data[place : place + 8] = packed
    else:
        header = _changed_json(header, chance)
        header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + bytes(data)


def _changed_bytes(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return b"\xff"
    begin = chance.randrange(len(content) if chance.random() < 0.3 else min(len(content), 400))
    end = min(len(content), begin + chance.choice([1, 1, 2, 8, 100]))
    match chance.randrange(6):
        case 0:
            return content[:begin]
        case 1:
            return content[:begin] + content[end:]
        case 2:
            return content[:end] + content[begin:]
        case 3:
            return content[:begin] + bytes(chance.randrange(256) for _ in range(end - begin)) + content[end:]
        case 4:
            return content + chance.choice([b"\0", b" ", b"\xff" * 9, b"}"])
        case _:
            return content[:begin] + bytes([content[begin] ^ (1 << chance.randrange(8))]) + content[begin + 1 :]
