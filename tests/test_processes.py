"""Calibration in several processes, as torchrun starts them, against one process; and merging files offline."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_ext.statistics import ExpertStatistics
from tests.conftest import DEMO_MODEL

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


def calibrate(*arguments: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "moe_ext", "calibrate", str(DEMO_MODEL), *map(str, arguments), *OPTIONS]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> ExpertStatistics:
    file = tmp_path_factory.mktemp("alone") / "stats.safetensors"
    result = calibrate("--text", text, "--out", file)
    assert result.returncode == 0, result.stderr
    return ExpertStatistics.load(file)


def assert_equal_up_to_the_order_of_sums(got: ExpertStatistics, expected: ExpertStatistics) -> None:
    for name, tensor in expected.tensors().items():
        if tensor.dtype == torch.int64:
            assert torch.equal(got.tensors()[name], tensor), name
        else:  # every addend is the same; float64 sums of a few thousand in another order differ by less than 1e-12
            torch.testing.assert_close(got.tensors()[name], tensor, rtol=1e-12, atol=0)
    assert (got.model_digest, got.dataset, got.shards) == (expected.model_digest, expected.dataset, expected.shards)


@pytest.mark.parametrize(("count", "mode"), [(2, ()), (3, ("--sequential",))])
def test_several_processes_find_what_one_does(
    count: int, mode: tuple[str, ...], text: Path, alone: ExpertStatistics, tmp_path: Path
) -> None:
    file = tmp_path / "stats.safetensors"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    result = calibrate("--text", text, "--out", file, *mode, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert_equal_up_to_the_order_of_sums(ExpertStatistics.load(file), alone)
    assert json.loads(result.stdout)["tokens"] == int(alone.tokens.max())  # only the first process prints
    assert [path.name for path in tmp_path.iterdir()] == ["stats.safetensors"]


def test_a_process_without_a_batch_takes_part(text: Path, tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "python.txt").write_text("def f(x):\n    return x\n")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    file = tmp_path / "stats.safetensors"
    result = calibrate("--text", tmp_path / "short", "--out", file, "--sequential", launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert int(ExpertStatistics.load(file).tokens.max()) == json.loads(result.stdout)["tokens"] > 0


def test_when_a_process_dies_the_others_stop_and_nothing_is_written(text: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    dying = """
import os, sys
import moe_ext.calibration, moe_ext.cli
if os.environ["RANK"] == "1":
    moe_ext.calibration.add_up = lambda stats: os.kill(os.getpid(), 9)
moe_ext.cli.main()
"""
    file = tmp_path / "stats.safetensors"
    arguments = ["calibrate", str(DEMO_MODEL), "--text", str(text), "--out", str(file), "--timeout", str(TIMEOUT)]
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
    assert list(tmp_path.glob("stats*")) == []


def test_files_of_several_machines_merge_to_one_run_over_all_the_text(
    alone: ExpertStatistics, text: Path, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    import moe_ext
    from moe_ext.checkpoint import load
    from moe_ext.cli import app
    from moe_ext.text import read_domains, token_batches

    model, tokenizer = load(DEMO_MODEL)
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
