"""Calibration and search in several processes, as torchrun starts them, against one; and merging files offline."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import moe_ext
from moe_ext.calibration.progress import CalibrationProgress
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.commands.main import app
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.reconstruction.result import SearchResult
from moe_ext.runtime import processes
from moe_ext.runtime.batches import read_domains, token_batches
from moe_ext.runtime.layer_walk import LayerInputs
from moe_ext.runtime.processes import process_group
from tests.support.batches import five_batches
from tests.support.families import build
from tests.support.forked import exit_status, fork
from tests.support.paths import DEMO_MODEL
from tests.support.reference import DEVICES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# 5 batches: shares of 3 and 2 with two processes, of 2, 2 and 1 with three.
OPTIONS = ("--window", "64", "--batch-size", "4", "--json")
TIMEOUT = 30  # seconds that the survivors of a dead process may take; a healthy run takes a few


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "python.txt").write_text((DEMO_MODEL / "held_out" / "python.txt").read_text()[:3700])
    return folder


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def torchrun(count: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))


def moe_ext_program(
    command: str, *arguments: str | Path, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, *launcher, "-m", "moe_ext", command, str(DEMO_MODEL), *map(str, arguments), *OPTIONS]
    return subprocess.run(whole, capture_output=True, text=True, check=False, env=environment())


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> ExpertStatistics:
    file = tmp_path_factory.mktemp("alone") / "stats.safetensors"
    result = moe_ext_program("calibrate", "--text", text, "--out", file)
    assert result.returncode == 0, result.stderr
    return ExpertStatistics.load(file)


def assert_equal_up_to_the_order_of_sums(got: ExpertStatistics, expected: ExpertStatistics) -> None:
    for name, tensor in expected.tensors().items():
        if not tensor.is_floating_point():
            assert torch.equal(got.tensors()[name], tensor), name
        else:  # every addend is the same; float64 sums of a few thousand in another order differ by less than 1e-12
            torch.testing.assert_close(got.tensors()[name], tensor, rtol=1e-12, atol=0)
    assert (got.model_digest, got.dataset, got.shards) == (expected.model_digest, expected.dataset, expected.shards)


@pytest.mark.parametrize(("count", "mode"), [(2, ()), (3, ("--sequential",))])
def test_several_processes_find_what_one_does(
    count: int, mode: tuple[str, ...], text: Path, alone: ExpertStatistics, tmp_path: Path
) -> None:
    file = tmp_path / "stats.safetensors"
    result = moe_ext_program("calibrate", "--text", text, "--out", file, *mode, launcher=torchrun(count))
    assert result.returncode == 0, result.stderr
    assert_equal_up_to_the_order_of_sums(ExpertStatistics.load(file), alone)
    assert json.loads(result.stdout)["tokens"] == int(alone.tokens.max())  # only the first process prints
    assert [path.name for path in tmp_path.iterdir()] == ["stats.safetensors"]


def test_when_a_process_dies_the_others_stop_and_nothing_is_written(text: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    dying = """
import os
import torch.distributed as dist
import moe_ext.commands.main
if os.environ["RANK"] == "1":
    dist.reduce = lambda *arguments: os.kill(os.getpid(), 9)
moe_ext.commands.main.main()
"""
    arguments = ["calibrate", str(DEMO_MODEL), "--text", str(text), "--out", str(tmp_path / "stats.safetensors")]
    arguments += ["--timeout", str(TIMEOUT)]
    begin = time.monotonic()
    # Without torchrun, which would end the others itself.
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", dying, *arguments, *OPTIONS],
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    messages = [process.communicate(timeout=3 * TIMEOUT)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, -9, 1]
    assert messages[0].startswith("error: ")
    assert messages[2].startswith("error: ")
    assert time.monotonic() - begin < 2 * TIMEOUT
    assert list(tmp_path.iterdir()) == []


def test_a_search_started_by_torchrun_writes_what_one_process_does(text: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    plan, losses = tmp_path / "plan.json", tmp_path / "plan.safetensors"
    arguments = ("--text", text, "--keep", "6", "--out", plan, "--sequential", "--scratch", tmp_path / "scratch")
    result = moe_ext_program("search", *arguments, launcher=torchrun(2))
    assert result.returncode == 0, result.stderr
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    batches = list(token_batches(read_domains([text]), tokenizer, window=64, batch_size=4))
    expected = moe_ext.search(model, batches, keep=6, progress=False)
    assert PruningPlan.load(plan).keep == expected.plan.keep
    assert_equal_losses(SearchResult.load(losses), expected)
    assert json.loads(result.stdout)["plan"] == str(plan)  # only the first process prints
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.safetensors", "scratch"]
    assert list((tmp_path / "scratch").iterdir()) == []


def assert_equal_losses(got: SearchResult, expected: SearchResult) -> None:
    for ours, theirs in zip(got.losses, expected.losses, strict=True):
        assert torch.equal(ours.keep, theirs.keep)
        # every batch's norm is the same; float64 sums of a few in another order
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-12, atol=0)


def forked(count: int, folder: Path, work: Callable[[int], object]) -> list[int]:
    """Exit statuses of forked processes that run ``work(rank)`` in one group of gloo, without importing anew."""

    def share(rank: int) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count,
            timeout=timedelta(seconds=TIMEOUT),
        )  # fmt: skip
        try:
            work(rank)
        except ValueError as error:
            (folder / f"error-{rank}").write_text(str(error))
            raise

    return [exit_status(child) for child in [fork(partial(share, rank)) for rank in range(count)]]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("folder", [False, True])
def test_a_process_without_a_batch_takes_part(folder: bool, tmp_path: Path) -> None:
    model: Any = build("mixtral")
    model.save_pretrained(tmp_path / "source")
    if folder:
        model = tmp_path / "source"
    batches = five_batches()[:2]

    def calibrating(rank: int) -> None:
        stats = moe_ext.calibrate(model, batches, progress=False, distributed=True)
        stats.save(tmp_path / f"{rank}.safetensors")

    assert forked(3, tmp_path, calibrating) == [0, 0, 0]
    expected = moe_ext.calibrate(model, batches, progress=False)
    for rank in range(3):
        got = ExpertStatistics.load(tmp_path / f"{rank}.safetensors")
        assert_equal_up_to_the_order_of_sums(got, expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("folder", [False, True])
def test_the_order_of_channels_is_that_of_the_text_of_all_processes(folder: bool, tmp_path: Path) -> None:
    model: Any = build("mixtral")
    model.save_pretrained(tmp_path / "source")
    if folder:
        model = tmp_path / "source"

    def calibrating(rank: int) -> None:
        stats = moe_ext.calibrate(model, five_batches(), channels="gram", progress=False, distributed=True)
        stats.save(tmp_path / f"{rank}.safetensors")

    assert forked(2, tmp_path, calibrating) == [0, 0]
    expected = moe_ext.calibrate(model, five_batches(), channels="gram", progress=False)
    for rank in range(2):
        got = ExpertStatistics.load(tmp_path / f"{rank}.safetensors")
        assert_equal_up_to_the_order_of_sums(got, expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_died_takes_the_orders_from_one_that_had_come_further(tmp_path: Path) -> None:
    source = tmp_path / "source"
    build("mixtral").save_pretrained(source)
    expected = moe_ext.calibrate(source, five_batches(), channels="gram", progress=False)
    options: dict[str, Any] = {"channels": "gram", "progress": False, "distributed": True}

    def dying(rank: int) -> None:
        write = CalibrationProgress.write

        def dies(self: Any, position: int) -> None:
            if rank == 1 and position == 2:
                os.kill(os.getpid(), 9)  # the other one has written the second layer
            write(self, position)

        CalibrationProgress.write = dies  # type: ignore[method-assign]
        moe_ext.calibrate(source, five_batches(), resume=tmp_path / f"unfinished-{rank}", **options)

    assert forked(2, tmp_path, dying) == [1, -9]
    (tmp_path / "meeting").unlink()

    def going_on(rank: int) -> None:
        stats = moe_ext.calibrate(source, five_batches(), resume=tmp_path / f"unfinished-{rank}", **options)
        stats.save(tmp_path / f"{rank}.safetensors")

    assert forked(2, tmp_path, going_on) == [0, 0]
    for rank in range(2):
        got = ExpertStatistics.load(tmp_path / f"{rank}.safetensors")
        assert_equal_up_to_the_order_of_sums(got, expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("count", [2, 3, 6])  # shares of 3 and 2 batches; 2, 2 and 1; the last has none
@pytest.mark.parametrize(
    "options",
    [
        {"method": "layerwise", "budget": "model"},
        {"method": "progressive", "skip": torch.full((3, 1), 0.5)},
        {"method": "greedy"},
        {"loss": "fisher"},
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_several_processes_search_as_one_does(
    folder: bool, options: dict[str, Any], count: int, tmp_path: Path
) -> None:
    model: Any = build("mixtral")
    options = {**options, "keep": 5, "progress": False}
    if folder:
        model.save_pretrained(tmp_path / "source")
        model, options["scratch"] = tmp_path / "source", tmp_path
    expected = moe_ext.search(model, five_batches(), **options)

    def searching(rank: int) -> None:
        resume = tmp_path / "all.safetensors"
        result = moe_ext.search(model, five_batches(), distributed=True, resume=resume, **options)
        result.save(tmp_path / f"{rank}.safetensors")

    assert forked(count, tmp_path, searching) == [0] * count
    results = [SearchResult.load(tmp_path / f"{name}.safetensors") for name in ("all", *range(count))]
    for got in results:
        assert got.plan.keep == expected.plan.keep
        assert_equal_losses(got, expected)
        for ours, first in zip(got.losses, results[0].losses, strict=True):
            assert torch.equal(ours.losses, first.losses)  # the same bits in each
    assert list(tmp_path.glob("*.states*")) == []


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and moe_ext built with CUDA kernels")
def test_processes_that_compute_on_cuda_find_what_one_does(tmp_path: Path) -> None:
    """Over gloo, which takes two processes on one GPU; nccl does not."""
    source = tmp_path / "source"
    build("mixtral", dtype=torch.bfloat16).save_pretrained(source)
    code = f"""
import sys, torch, moe_ext
from tests.support.batches import five_batches
rank, meeting = sys.argv[1], "file://{tmp_path}/meeting"
torch.distributed.init_process_group("gloo", init_method=meeting, rank=int(rank), world_size=2)
options = {{"distributed": True, "progress": False, "device": "cuda"}}
moe_ext.calibrate("{source}", five_batches(), **options).save("{tmp_path}/stats-" + rank)
moe_ext.search("{source}", five_batches(), keep=5, **options).save("{tmp_path}/" + rank + ".safetensors")
"""
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    assert [process.wait() for process in ranks] == [0, 0]
    stats = moe_ext.calibrate(source, five_batches(), progress=False, device="cuda")
    found = moe_ext.search(source, five_batches(), keep=5, progress=False, device="cuda")
    for rank in range(2):
        assert_equal_up_to_the_order_of_sums(ExpertStatistics.load(tmp_path / f"stats-{rank}"), stats)
        assert_equal_losses(SearchResult.load(tmp_path / f"{rank}.safetensors"), found)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_search_of_several_processes_goes_on_from_its_file(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "source")
    options: dict[str, Any] = {"keep": 5, "method": "progressive", "progress": False, "scratch": tmp_path}
    expected = moe_ext.search(tmp_path / "source", five_batches(), **options)
    options |= {"resume": tmp_path / "all.safetensors", "distributed": True}

    def dying(rank: int) -> None:
        advance = LayerInputs.advance

        def dies(self: Any, before: Any = None) -> None:
            if rank == 1 and self._position == 1:
                os.kill(os.getpid(), 9)
            advance(self, before)

        LayerInputs.advance = dies  # type: ignore[method-assign]
        moe_ext.search(tmp_path / "source", five_batches(), **options)

    assert forked(2, tmp_path, dying) == [1, -9]
    with pytest.raises(ValueError, match="the search is not finished"):
        SearchResult.load(tmp_path / "all.safetensors")
    (tmp_path / "meeting").unlink()

    def going_on(rank: int) -> None:
        passes, advance = [], LayerInputs.advance

        def counting(self: Any, before: Any = None) -> None:
            passes.append(self._position)
            advance(self, before)

        LayerInputs.advance = counting  # type: ignore[method-assign]
        moe_ext.search(tmp_path / "source", five_batches(), **options)
        assert passes == ([] if rank == 0 else [1])  # the first had come further than the one that died

    assert forked(2, tmp_path, going_on) == [0, 0]
    assert SearchResult.load(tmp_path / "all.safetensors").plan.keep == expected.plan.keep
    assert_equal_losses(SearchResult.load(tmp_path / "all.safetensors"), expected)


def other_expert(model: Any) -> Any:
    """The model with another weight in one expert of one layer."""
    model.model.layers[1].mlp.experts.down_proj.data[3] *= 1.5
    return model


JOBS: dict[str, tuple[Callable[[int, Path], object], str]] = {
    "text": (
        lambda rank, _: moe_ext.calibrate(build("mixtral"), five_batches()[rank:], distributed=True, progress=False),
        "text as cut into batches",
    ),
    "window": (
        lambda rank, _: moe_ext.search(
            build("mixtral"), [five_batches()[0], *([] if rank else five_batches()[1:])], keep=5, distributed=True
        ),
        "text as cut into batches",
    ),
    "outputs": (
        lambda rank, _: moe_ext.calibrate(build("mixtral"), five_batches(), distributed=True, outputs=rank == 1),
        "outputs",
    ),
    "method": (
        lambda rank, _: moe_ext.search(
            build("mixtral"), five_batches(), keep=5 + rank, distributed=True, method="greedy" if rank else "layerwise"
        ),
        "method, keep",
    ),
    "dtype": (
        lambda rank, _: moe_ext.calibrate(
            build("mixtral", dtype=(torch.float32, torch.bfloat16)[rank]), five_batches(), distributed=True
        ),
        "dtype, weights",
    ),
    "expert": (
        lambda rank, _: moe_ext.calibrate(
            (build, lambda name: other_expert(build(name)))[rank]("mixtral"), five_batches(), distributed=True
        ),
        "weights",
    ),
    "expert in a folder": (
        lambda rank, folder: moe_ext.search(folder / f"source-{rank}", five_batches(), keep=5, distributed=True),
        "weights",
    ),
    "dtype of a folder": (
        lambda rank, folder: moe_ext.calibrate(
            folder / "source-0", five_batches(), dtype=("float32", "bfloat16")[rank], distributed=True
        ),
        "dtype",
    ),
}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("case", JOBS)
def test_processes_that_do_not_do_the_same_job_stop_before_it_begins(case: str, tmp_path: Path) -> None:
    job, differing = JOBS[case]
    build("mixtral").save_pretrained(tmp_path / "source-0")
    other_expert(build("mixtral")).save_pretrained(tmp_path / "source-1")

    def doing(rank: int) -> None:
        def begins(*_: object, **__: object) -> None:
            raise AssertionError("the work began")

        torch.nn.Embedding.forward = begins  # type: ignore[assignment]
        job(rank, tmp_path)

    assert forked(2, tmp_path, doing) == [1, 1]
    message = f"the processes do not do the same job: rank 1 differs from rank 0 in {differing}"
    assert [(tmp_path / f"error-{rank}").read_text() for rank in range(2)] == [message] * 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_one_model_in_folders_of_other_names_shards_and_times_is_one_job(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "source-0")
    build("mixtral").save_pretrained(tmp_path / "source-1", max_shard_size=20_000)

    def doing(rank: int) -> None:
        moe_ext.calibrate(tmp_path / f"source-{rank}", five_batches(), distributed=True, progress=False)

    assert forked(2, tmp_path, doing) == [0, 0]


def test_a_process_whose_store_listens_but_does_not_speak_is_waited_for_no_longer_than_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the first process's does when it is stopped: the system takes connections on its behalf."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1])}
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", **place}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(TimeoutError, match="did not find each other within 1 seconds"), process_group("cpu", 1):
            pytest.fail("the processes found each other")


@pytest.mark.parametrize(
    ("device", "local", "backend", "place"), [("cpu", "1", "gloo", "cpu"), ("cuda", "3", "nccl", "cuda:3")]
)
def test_a_process_joins_by_nccl_with_a_gpu_of_its_own_and_else_by_gloo(
    device: str, local: str, backend: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(dist, "init_process_group", lambda name, timeout: asked.append((name, timeout.total_seconds())))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: asked.append("left"))
    with process_group(device, 7) as got:
        assert got == place
    assert asked == [*([place] if backend == "nccl" else []), (backend, 7.0), "left"]


@pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), ("nccl", "cuda")])
def test_sums_are_taken_where_the_backend_takes_tensors(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    assert processes._device() == torch.device(device)


def test_files_of_several_machines_merge_to_one_run_over_all_the_text(
    alone: ExpertStatistics, text: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    batches = list(token_batches(read_domains([text]), tokenizer, window=64, batch_size=4))
    for name, part in (("a", batches[:3]), ("b", batches[3:])):
        stats = moe_ext.calibrate(model, part, progress=False, dataset="python", shard=name)
        stats.save(tmp_path / f"{name}.safetensors")
    a, b, everything = (str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "all"))
    result = CliRunner().invoke(app, ["merge", a, b, "-o", everything])
    assert result.exit_code == 0
    merged = ExpertStatistics.load(everything)
    assert merged.shards == ("a", "b")
    merged.shards = alone.shards
    assert_equal_up_to_the_order_of_sums(merged, alone)

    refused = CliRunner().invoke(app, ["merge", everything, b, "-o", str(tmp_path / "more.safetensors")])
    assert "b.safetensors: both hold the shard 'b'" in str(refused.exception)
    assert not (tmp_path / "more.safetensors").exists()
    told = CliRunner().invoke(
        app, ["merge", everything, b, "-o", str(tmp_path / "more.safetensors"), "--allow-duplicates"]
    )
    assert told.exit_code == 0
    assert ExpertStatistics.load(tmp_path / "more.safetensors").shards == ("a", "b", "b")


def test_the_same_text_is_not_merged_twice_without_a_label(alone: ExpertStatistics) -> None:
    assert len(alone.shards) == 1
    with pytest.raises(ValueError, match="both hold the shard"):
        _ = alone + alone
