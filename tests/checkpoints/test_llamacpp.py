"""Pruned GGUF files in llama.cpp, and folders in its converter. Opt-in: ``make test-llamacpp``."""

import json
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers

import moe_ext
from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import moe_blocks
from tests.support.families import build, keep_of, plan_for
from tests.support.gguf_converter import FAMILIES, model_of
from tests.support.gguf_files import read_fields, read_tensors
from tests.support.llamacpp import LLAMACPP, OPT_IN, convert, write_tokenizer
from tests.support.paths import ROOT

pytestmark = OPT_IN

SHARED: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16}
SIZES = {
    "mixtral": {**SHARED, "intermediate_size": 64},
    "qwen3_moe": {**SHARED, "moe_intermediate_size": 64},
    "qwen2_moe": {**SHARED, "moe_intermediate_size": 64, "mlp_only_layers": []},
}
WHATS = ("whole", "fewer", "thin", "both")
PRUNED = [*((what, "f32") for what in WHATS[1:]), ("both", "q8_0"), ("both", "q4_0")]
TOKENS = [5, 17, 300, 4000, 8, 9, 10, 11]
Q4_0 = 2  # llama.cpp's number of a file of that type


def plans(family: str) -> dict[str, PruningPlan]:
    """Fewer experts; all experts with half their channels; both."""
    model = build(family, **SIZES[family])
    everything = plan_for(model, tuple(tuple(range(block.num_experts)) for block in moe_blocks(model)))
    fewer = plan_for(model, keep_of(model, family))
    return {
        "fewer": fewer,
        **{name: replace(plan, channels=blocks(plan)) for name, plan in (("thin", everything), ("both", fewer))},
    }


def blocks(plan: PruningPlan) -> KeptChannels:
    """Of every second expert the first 32 channels, of the others the last: whole blocks of Q8_0 and Q4_0."""
    kept = [torch.stack([torch.arange(32) + 32 * (place % 2) for place in range(len(keep))]) for keep in plan.keep]
    return KeptChannels.of(kept, 64)


@dataclass(frozen=True)
class Made:
    """Of a family: folders ``WHAT``; files ``WHAT TYPE.gguf`` of the converter; files ``WHAT TYPE ours.gguf`` that were
    pruned as GGUF; and llama.cpp's logits of all files by their names without the ending."""

    family: str
    folder: Path
    logits: dict[str, Any]


@pytest.fixture(scope="module", params=list(SIZES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    family, folder = request.param, tmp_path_factory.mktemp("llamacpp")
    whole = folder / "whole"
    build(family, vocab_size=write_tokenizer(whole), **SIZES[family]).save_pretrained(whole)
    for name, plan in plans(family).items():
        moe_ext.prune_checkpoint(whole, plan, folder / name, progress=False)
    for name in WHATS:
        convert(folder / name, "f32")
    for name in ("whole", "both"):
        convert(folder / name, "q8_0")
    quantised = [[f"{folder}/{name} f32.gguf", f"{folder}/{name} q4_0.gguf", Q4_0] for name in ("whole", "both")]
    run(folder, {"quantise": quantised, "logits": {}, "tokens": TOKENS})
    for name, kind in PRUNED:
        ours = folder / f"{name} {kind} ours.gguf"
        moe_ext.prune_gguf(folder / f"whole {kind}.gguf", plans(family)[name], ours, progress=False)
    files = {file.stem: str(file) for file in folder.glob("*.gguf")}
    run(folder, {"quantise": [], "logits": files, "tokens": TOKENS})
    return Made(family, folder, dict(numpy.load(folder / "results.npz")))


def run(folder: Path, jobs: dict[str, Any]) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [str(LLAMACPP / "bin" / "python"), str(ROOT / "tests/support/llamacpp_logits.py"), "jobs.json", "results.npz"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("what", "kind"), PRUNED)
def test_a_pruned_gguf_is_that_of_the_pruned_folder(what: str, kind: str, made: Made) -> None:
    """Tensors, metadata and logits, bit by bit: rounding to blocks and taking experts out can change places."""
    theirs, ours = (f"{what} {kind}{end}" for end in ("", " ours"))
    assert read_tensors(made.folder / f"{ours}.gguf") == read_tensors(made.folder / f"{theirs}.gguf")
    got, expected = (read_fields(made.folder / f"{name}.gguf") for name in (ours, theirs))
    assert got.keys() == expected.keys()
    differ = {name for name, value in got.items() if value != expected[name]}
    assert differ <= {
        "general.name",
        "general.size_label",
        "general.finetune",
    }  # what the converter reads of the folder
    assert numpy.array_equal(made.logits[ours], made.logits[theirs])


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_a_converted_file_are_those_of_the_folder(family: str, tmp_path: Path) -> None:
    whole, source = tmp_path / "whole", tmp_path / "source"
    model_of(family, vocab_size=write_tokenizer(whole, family)).save_pretrained(whole)
    source.mkdir()
    shutil.copy(convert(whole, "f32"), source)
    shutil.copy(whole / "config.json", source)
    batches = [{"input_ids": torch.tensor([TOKENS])}]
    got = moe_ext.calibrate(source, batches, progress=False)
    expected = moe_ext.calibrate(whole, batches, progress=False)
    assert torch.equal(got.coactivation, expected.coactivation)
    torch.testing.assert_close(got.moments, expected.moments, rtol=1e-4, atol=0)  # memory may be aligned otherwise


@pytest.mark.parametrize("what", WHATS)
def test_llamacpp_computes_what_transformers_does(what: str, made: Made) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(made.folder / what, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert numpy.abs(expected).max() > 5
    assert numpy.abs(made.logits[f"{what} f32"] - expected).max() < 2e-3
