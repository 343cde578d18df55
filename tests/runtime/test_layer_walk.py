"""Calibration and search from a checkpoint folder, one decoder layer at a time, against the loaded model."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import FineGrainedFP8Config
from typer.testing import CliRunner

import moe_ext
from moe_ext.calibration import calibrate as calibrate_module
from moe_ext.calibration.observer import take as take_sums
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints import streamed_model
from moe_ext.checkpoints.load_save import write_thresholds
from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.commands.main import app
from moe_ext.reconstruction.result import SearchResult
from moe_ext.runtime.hidden_states import MappedStates
from moe_ext.runtime.layer_walk import LayerInputs
from tests.support.batches import random_tokens
from tests.support.checkpoints import BLOCK, declare_float8, plain_copy, quantise, rewritten
from tests.support.families import ALL, STOCK_ONLY, build, keep_of, plan_for
from tests.support.forked import exit_status, fork
from tests.support.paths import DEMO_MODEL
from tests.support.reference import DEVICES


def ragged_batches() -> list[dict[str, torch.Tensor]]:
    batches = [{"input_ids": random_tokens(2, 13, seed=seed)} for seed in (1, 2, 3)]
    batches[0]["attention_mask"] = torch.tensor([[1] * 13, [1] * 5 + [0] * 8])
    batches.append({"input_ids": random_tokens(1, 7, seed=4)})
    return batches


def assert_same_bits(got: ExpertStatistics, expected: ExpertStatistics) -> None:
    for name, tensor in expected.tensors().items():
        assert torch.equal(got.tensors()[name], tensor), name
    assert (got.layers, got.experts, got.gate, got.dataset) == (
        expected.layers, expected.experts, expected.gate, expected.dataset,
    )  # fmt: skip
    assert got.model_digest == expected.model_digest != ""


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    build("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path / "source", max_shard_size=20_000)
    return tmp_path / "source"


@pytest.mark.parametrize("family", ALL)
def test_statistics_are_those_of_the_loaded_model_bit_by_bit(family: str, tmp_path: Path) -> None:
    model = build(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    strict = family not in STOCK_ONLY
    options: dict[str, Any] = {"progress": False, "outputs": True, "strict": strict, "dataset": "random"}
    loaded = type(model).from_pretrained(tmp_path / "source", dtype="auto").eval()
    expected = moe_ext.calibrate(loaded, ragged_batches(), **options)
    got = moe_ext.calibrate(tmp_path / "source", ragged_batches(), **options)
    assert_same_bits(got, expected)


# A fused router, and one that runs its own code.
@pytest.mark.parametrize(
    ("device", "family", "scratch"),
    [("cpu", family, scratch) for family in ("mixtral", "deepseek_v3") for scratch in (False, True)]
    + [(device, *case) for device in DEVICES[1:] for case in (("mixtral", False), ("deepseek_v3", True))],
)
def test_a_layer_computes_on_the_device_asked_for(device: str, family: str, scratch: bool, tmp_path: Path) -> None:
    build(family, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    (tmp_path / "scratch").mkdir()
    options: dict[str, Any] = {"progress": False, "outputs": True}
    loaded = moe_ext.from_pretrained(tmp_path / "source").to(device)
    expected = moe_ext.calibrate(loaded, ragged_batches(), **options)
    if scratch:
        options["scratch"] = tmp_path / "scratch"
    got = moe_ext.calibrate(tmp_path / "source", ragged_batches(), device=device, **options)
    assert_same_bits(got, expected)
    on_cpu = moe_ext.calibrate(tmp_path / "source", ragged_batches(), **options)
    assert torch.equal(got.tokens, on_cpu.tokens)
    # Activations are rounded to bfloat16 (2^-9 relative) in other places; a token near a tie changes its expert.
    norms, others = got.moments[:, :, 0, 1].sum(1), on_cpu.moments[:, :, 0, 1].sum(1)
    torch.testing.assert_close(norms, others, rtol=0.05, atol=0)


def test_layers_that_differ_are_built_as_they_are(tmp_path: Path) -> None:
    model = build("mixtral")
    plan = plan_for(model, keep_of(model, "mixtral", fewer=1))
    moe_ext.prune(model, plan).save_pretrained(tmp_path / "source")
    expected = moe_ext.calibrate(moe_ext.from_pretrained(tmp_path / "source"), ragged_batches(), progress=False)
    assert_same_bits(moe_ext.calibrate(tmp_path / "source", ragged_batches(), progress=False), expected)


def test_another_dtype_is_that_of_the_loaded_model(mixtral: Path) -> None:
    loaded = moe_ext.from_pretrained(mixtral, dtype=torch.float32)
    expected = moe_ext.calibrate(loaded, ragged_batches(), progress=False)
    assert_same_bits(moe_ext.calibrate(mixtral, ragged_batches(), progress=False, dtype="float32"), expected)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("device", DEVICES)
def test_float8_weights_are_what_transformers_makes_of_them(device: str, family: str, tmp_path: Path) -> None:
    build(family, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    rewritten(tmp_path / "source", lambda tensors: quantise(tensors, 4))  # transformers wants sizes that blocks divide
    declare_float8(tmp_path / "source", 4)
    loaded = moe_ext.from_pretrained(tmp_path / "source", quantization_config=FineGrainedFP8Config(dequantize=True))
    options: dict[str, Any] = {"progress": False, "outputs": True}
    expected = moe_ext.calibrate(loaded.to(device), ragged_batches(), **options)
    assert_same_bits(moe_ext.calibrate(tmp_path / "source", ragged_batches(), device=device, **options), expected)


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_blocks_of_float8_weights_need_not_divide_their_sizes(layout: str, tmp_path: Path) -> None:
    build("deepseek_v3", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "source", save_original_format=layout == "hub"
    )
    rewritten(tmp_path / "source", quantise)
    declare_float8(tmp_path / "source", BLOCK)
    plain_copy(tmp_path / "source", tmp_path / "plain")
    expected = moe_ext.calibrate(tmp_path / "plain", ragged_batches(), progress=False)
    got = moe_ext.calibrate(tmp_path / "source", ragged_batches(), progress=False)
    assert torch.equal(got.coactivation, expected.coactivation)
    torch.testing.assert_close(got.moments, expected.moments, rtol=1e-3, atol=0)  # memory may be aligned otherwise
    declare_float8(tmp_path / "source", 8)
    with pytest.raises(ValueError, match=r"has shape .*, which is none of scales of .* weights"):
        moe_ext.calibrate(tmp_path / "source", ragged_batches(), progress=False)


def test_hidden_states_may_lie_in_a_scratch_folder(mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    expected = moe_ext.calibrate(mixtral, ragged_batches(), progress=False)
    got = moe_ext.calibrate(mixtral, ragged_batches(), progress=False, scratch=tmp_path / "scratch")
    assert_same_bits(got, expected)
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("device", DEVICES)
def test_one_decoder_layer_is_in_memory_at_a_time(device: str, mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    need = LayersOnDisk.need

    def watched(self: LayersOnDisk, layer: int) -> None:
        need(self, layer)
        there = {
            (name.split(".")[2], parameter.device.type)
            for name, parameter in self.model.named_parameters()
            if ".layers." in name and parameter.device.type != "meta"
        }
        head = self.model.get_output_embeddings().weight.device.type
        seen.append((layer, there, head))

    monkeypatch.setattr(LayersOnDisk, "need", watched)
    moe_ext.calibrate(mixtral, ragged_batches(), progress=False, device=device)
    assert seen == [(layer, {(str(layer), device)}, "meta") for layer in range(3)]


def test_the_next_layer_is_read_while_one_computes(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    start = streamed_model._Reader.start

    def watched(self: Any, tensors: list[Any]) -> None:
        asked.append({tensor.name.split(".")[2] for tensor in tensors})
        start(self, tensors)
        self._thread.join()
        assert not self._stopped.is_set()

    monkeypatch.setattr(streamed_model._Reader, "start", watched)
    moe_ext.calibrate(mixtral, ragged_batches(), progress=False)
    assert asked == [{"1"}, {"2"}]
    moe_ext.calibrate(mixtral, ragged_batches(), progress=False, read_ahead=False)
    assert len(asked) == 2


def killed_after(passes: int, work: Callable[[], object]) -> int:
    """Runs in a forked process that is killed before its pass number ``passes``; its exit status."""

    def killed() -> None:
        advance, left = LayerInputs.advance, [passes]

        def dies(self: Any, before: Any = None) -> None:
            if left[0] == 0:
                os.kill(os.getpid(), 9)
            left[0] -= 1
            advance(self, before)

        LayerInputs.advance = dies  # type: ignore[method-assign]
        work()

    return exit_status(fork(killed))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("scratch", [False, True])
def test_a_killed_run_goes_on_and_ends_with_the_same_statistics(
    passes: int, scratch: bool, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    options: dict[str, Any] = {"progress": False, "outputs": True, "resume": tmp_path / "resume.safetensors"}
    if scratch:
        options["scratch"] = tmp_path / "scratch"
    expected = moe_ext.calibrate(mixtral, ragged_batches(), progress=False, outputs=True)
    assert killed_after(passes, lambda: moe_ext.calibrate(mixtral, ragged_batches(), **options)) == -9

    ran, observed = [], []
    advance, take = LayerInputs.advance, take_sums

    def counting(self: Any, before: Any = None) -> None:
        ran.append(self._position)
        advance(self, before)

    def noting(stats: Any, layer: int, observer: Any, total: Any) -> None:
        observed.append(layer)
        take(stats, layer, observer, total)

    monkeypatch.setattr(LayerInputs, "advance", counting)
    monkeypatch.setattr(calibrate_module, "take", noting)
    assert_same_bits(moe_ext.calibrate(mixtral, ragged_batches(), **options), expected)
    assert ran == list(range(passes if scratch else 0, 3))
    assert observed == list(range(passes, 3))
    assert list((tmp_path / "scratch").iterdir()) == []
    # A run whose result was lost after it was done runs nothing again.
    ran.clear()
    assert_same_bits(moe_ext.calibrate(mixtral, ragged_batches(), **options), expected)
    assert ran == []


DYING = """
import os, signal, sys
from moe_ext.calibration import progress
from moe_ext.commands.main import main
from moe_ext.runtime import hidden_states
owner = getattr(progress if sys.argv[1] == "CalibrationProgress" else hidden_states, sys.argv[1])
function, left = sys.argv[2], int(sys.argv[3])
original = getattr(owner, function)
def dies(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(owner, function, dies)
sys.argv[1:4] = []
main()
"""


@pytest.mark.slow
def test_the_killed_program_ends_with_the_same_file_once_it_is_let(tmp_path: Path) -> None:
    text, out, expected = tmp_path / "python.txt", tmp_path / "stats.safetensors", tmp_path / "expected.safetensors"
    text.write_text((DEMO_MODEL / "held_out" / "python.txt").read_text()[:1500])
    (tmp_path / "scratch").mkdir()
    arguments = ["calibrate", str(DEMO_MODEL), "--text", str(text), "--sequential", "--window", "64", "--json"]
    assert CliRunner().invoke(app, [*arguments, "--batch-size", "2", "--out", str(expected)]).exit_code == 0
    arguments += ["--batch-size", "2", "--out", str(out), "--scratch", str(tmp_path / "scratch")]
    for point in (
        ("CalibrationProgress", "write", "1"),  # two layers have run, one is noted
        ("MappedStates", "write", "5"),  # in the midst of a layer's batches
    ):
        killed = subprocess.run([sys.executable, "-c", DYING, *point, *arguments], capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not out.exists()
        assert (tmp_path / ".stats.safetensors.0.partial").exists()
    done = subprocess.run([sys.executable, "-m", "moe_ext", *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == expected.read_bytes()
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not (tmp_path / ".stats.safetensors.0.partial").exists()


def test_a_file_of_another_run_is_refused(mixtral: Path, tmp_path: Path) -> None:
    resume = tmp_path / "resume.safetensors"
    moe_ext.calibrate(mixtral, ragged_batches(), progress=False, resume=resume)
    with pytest.raises(ValueError, match="is of another run"):
        moe_ext.calibrate(mixtral, ragged_batches()[:2], progress=False, resume=resume)
    resume.write_text("not one")
    with pytest.raises(ValueError, match="no file of an interrupted calibration"):
        moe_ext.calibrate(mixtral, ragged_batches(), progress=False, resume=resume)


def test_hidden_states_without_room_are_refused_before_anything_runs(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(MemoryError, match="give a scratch folder, or less text"):
        moe_ext.calibrate(mixtral, ragged_batches(), progress=False)
    with pytest.raises(FileNotFoundError, match="scratch: the folder"):
        moe_ext.calibrate(mixtral, ragged_batches(), progress=False, scratch=tmp_path / "none")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(OSError, match=r"scratch: the hidden states of all batches take"):
        moe_ext.calibrate(mixtral, ragged_batches(), progress=False, scratch=tmp_path)


def test_what_cannot_be_calibrated_is_refused(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="scratch: is for a checkpoint folder"):
        moe_ext.calibrate(build("mixtral"), ragged_batches(), progress=False, scratch=tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        moe_ext.calibrate(tmp_path / "none", ragged_batches(), progress=False)
    with pytest.raises(ValueError, match="no token was counted"):
        moe_ext.calibrate(mixtral, [], progress=False)
    with pytest.raises(ValueError, match="batch 0 is no mapping"):
        moe_ext.calibrate(mixtral, [1], progress=False)
    shutil.copytree(mixtral, tmp_path / "cut")
    shard = next((tmp_path / "cut").glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        moe_ext.calibrate(tmp_path / "cut", ragged_batches(), progress=False)


METHODS = ["layerwise", "progressive", "greedy"]


def assert_same_search(got: SearchResult, expected: SearchResult) -> None:
    assert got.plan == expected.plan
    for ours, theirs in zip(got.losses, expected.losses, strict=True):
        assert torch.equal(ours.losses, theirs.losses)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_search_finds_what_it_finds_in_the_loaded_model(
    device: str, method: Any, mixtral: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": method, "keep": 6, "progress": False}
    expected = moe_ext.search(moe_ext.from_pretrained(mixtral).to(device), ragged_batches(), **options)
    assert_same_search(moe_ext.search(mixtral, ragged_batches(), device=device, **options), expected)
    (tmp_path / "scratch").mkdir()
    options["scratch"] = tmp_path / "scratch"
    assert_same_search(moe_ext.search(mixtral, ragged_batches(), device=device, **options), expected)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_search_takes_skip_thresholds_from_the_config(mixtral: Path) -> None:
    thresholds = torch.tensor([[0.6], [0.3], [0.8]])
    write_thresholds(mixtral, thresholds, range(len(thresholds)))
    options: dict[str, Any] = {"method": "progressive", "keep": 6, "progress": False}
    expected = moe_ext.search(moe_ext.from_pretrained(mixtral), ragged_batches(), skip=thresholds, **options)
    assert_same_search(moe_ext.search(mixtral, ragged_batches(), skip="config", **options), expected)
    with pytest.raises(ValueError, match="skip is 'median'; expected thresholds, 'config' or None"):
        moe_ext.search(mixtral, ragged_batches(), skip="median", **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])  # every layer has experts; all but the second
def test_a_killed_search_with_a_scratch_folder_runs_no_layer_again(
    family: str, method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(family, norm_topk_prob=True).save_pretrained(tmp_path / "source")
    (tmp_path / "scratch").mkdir()
    options: dict[str, Any] = {"method": method, "keep": 6, "progress": False, "scratch": tmp_path / "scratch"}
    expected = moe_ext.search(tmp_path / "source", ragged_batches(), **options)
    last = 2  # of three layers: its router is observed, and what follows it does not run
    ran: list[int] = []
    advance = LayerInputs.advance

    def counting(self: Any, before: Any = None) -> None:
        ran.append(self._position)
        advance(self, before)

    for passes in range(1, last):
        options["resume"] = tmp_path / f"after-{passes}.safetensors"
        assert killed_after(passes, lambda: moe_ext.search(tmp_path / "source", ragged_batches(), **options)) == -9
        ran.clear()
        with monkeypatch.context() as watched:
            watched.setattr(LayerInputs, "advance", counting)
            assert_same_search(moe_ext.search(tmp_path / "source", ragged_batches(), **options), expected)
        assert ran == list(range(passes, last))
        assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_search_that_died_before_its_plan_leaves_no_states_once_it_is_run_again(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    options: dict[str, Any] = {"keep": 6, "progress": False, "scratch": tmp_path / "scratch"}
    options["resume"] = tmp_path / "losses.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr("moe_ext.reconstruction.search._chosen", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert exit_status(fork(lambda: moe_ext.search(mixtral, ragged_batches(), **options))) == -signal.SIGKILL
    assert list((tmp_path / "scratch").iterdir()) != []
    moe_ext.search(mixtral, ragged_batches(), **options)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_two_equal_jobs_do_not_write_one_another_s_hidden_states(tmp_path: Path) -> None:
    first = MappedStates(tmp_path, "job", [4096], 0, hold=False)
    with pytest.raises(BlockingIOError, match=f"scratch: another process is doing the same job in {tmp_path}"):
        MappedStates(tmp_path, "job", [4096], 0, hold=False)
    MappedStates(tmp_path, "other", [4096], 0, hold=False).close()
    first.write(0, torch.zeros(1, 8, 32))
    first.close()
    assert list(tmp_path.iterdir()) == []  # no layer was done
    MappedStates(tmp_path, "job", [4096], 0, hold=False).remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_scratch_folder_that_is_full_is_named(mixtral: Path, tmp_path: Path) -> None:
    """The room is taken before anything is written: a mapped file without it would be a bus error."""

    def calibrating() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=f"scratch: {tmp_path} has no room for .* of hidden states"):
            moe_ext.calibrate(mixtral, ragged_batches(), progress=False, scratch=tmp_path)

    assert exit_status(fork(calibrating)) == 0


def test_the_room_for_hidden_states_is_said_before_anything_runs(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(self: Any, before: Any = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LayerInputs, "advance", stopped)
    batches = [{"input_ids": random_tokens(8, 1000)}] * 10  # 80 000 tokens of 32 bfloat16
    with pytest.raises(KeyboardInterrupt):
        moe_ext.calibrate(mixtral, batches)
    assert "hidden states of 10 batches: 0.01 GB in memory" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        moe_ext.search(mixtral, batches, keep=6, scratch=tmp_path)
    assert f"hidden states of 10 batches: 0.01 GB in {tmp_path}, twice" in capsys.readouterr().err


@pytest.mark.parametrize("device", DEVICES)
def test_an_interrupted_search_goes_on_with_the_layers_that_are_left(
    device: str, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"keep": 6, "progress": False, "device": device}
    expected = moe_ext.search(mixtral, ragged_batches(), **options)
    options["resume"] = tmp_path / "losses.safetensors"
    observe, searched = LayerInputs.observe, []

    def interrupted(self: LayerInputs, block: int, seen: Any) -> None:
        searched.append(block)
        if searched == [0, 1]:
            raise KeyboardInterrupt
        observe(self, block, seen)

    monkeypatch.setattr(LayerInputs, "observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moe_ext.search(mixtral, ragged_batches(), **options)
    assert_same_search(moe_ext.search(mixtral, ragged_batches(), **options), expected)
    assert searched == [0, 1, 1, 2]


def test_an_option_for_folders_is_refused_with_a_model() -> None:
    with pytest.raises(TypeError, match="dtype: is for a checkpoint folder"):
        moe_ext.search(build("mixtral"), ragged_batches(), keep=6, progress=False, dtype="float32")
