"""moe-ext bench: sizes from a model's config alone, rows that add up, and what is kept when it is stopped."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from moe_ext.bench import measure
from moe_ext.bench.figure import speed_figure
from moe_ext.bench.measure import Measured, Shape, measurements
from moe_ext.bench.weights import WEIGHT_TYPES, WeightType
from tests.support.command_line import inside
from tests.support.paths import DEMO_MODEL
from tests.support.reference import DEVICES

SMALL = ["--shape", "32,48,4,2", "--tokens", "1,3", "--seconds", "0.01", "--dtype", "float32"]


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CACHE_BYTES", 1 << 20)


def test_sizes_come_from_a_config_without_weights(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(DEMO_MODEL)
    config.save_pretrained(tmp_path)  # a folder without weights
    assert Shape.of_model(tmp_path) == Shape(
        config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok
    )


def test_sizes_are_those_of_mixtral_8x7b(tmp_path: Path) -> None:
    fields = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 32, "num_attention_heads": 32}))
    assert Shape.of_model(tmp_path) == Shape(4096, 14336, 8, 2)


def test_a_row_is_measured_on_the_cpu(small_cache: None) -> None:
    rows = list(measurements(Shape(32, 48, 4, 2), torch.float32, "cpu", [1, 3], seconds=0.01))
    assert [row.tokens for row in rows] == [1, 3]
    for row in rows:
        assert set(row.peers) == {"eager", "grouped_mm", "batched_mm"}
        assert min(row.ours, row.limit, *row.peers.values()) > 0
        assert row.record["active"] <= min(4, row.tokens * 2)
        assert row.record["of limit"] == pytest.approx(row.limit / row.ours)


def test_the_picture_shows_ours_every_peer_and_the_limit() -> None:
    rows = [Measured(1, 1.0, {"eager": 2.0, "batched_mm": 3.0}, 0.5, {}), Measured(4, 2.0, {"eager": 4.0}, 1.0, {})]
    axes = speed_figure(rows, "title").axes[0]
    lines: dict[str, Any] = {str(line.get_label()): [*map(float, line.get_ydata())] for line in axes.lines}  # type: ignore[arg-type]
    assert lines == {
        "eager": [2.0, 4.0],
        "batched_mm": [3.0],
        "moe_ext": [1.0, 2.0],
        "limit of the machine": [0.5, 1.0],
    }


def test_the_command_writes_table_json_and_picture(
    small_cache: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inside("bench", *SMALL, "--out", str(tmp_path / "bench.json"), "--png", str(tmp_path / "bench.png")) == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["shape"] == {"hidden": 32, "intermediate": 48, "num_experts": 4, "top_k": 2}
    assert [row["T"] for row in written["rows"]] == [1, 3]
    assert written["complete"] is True
    assert written["threads"] == torch.get_num_threads()
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "of limit" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> Iterator[Measured]:
        yield Measured(1, 1.0, {"eager": 2.0}, 0.5, {"T": 1})
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measurements", stopped)
    assert inside("bench", *SMALL, "--out", str(tmp_path / "bench.json")) == 130
    written = json.loads((tmp_path / "bench.json").read_text())
    assert (written["rows"], written["complete"]) == ([{"T": 1}], False)
    output = capsys.readouterr()
    assert "eager" in output.out
    assert "what was measured until then is kept" in output.err


@pytest.mark.slow
def test_ctrl_c_while_measuring_keeps_the_rows_before(tmp_path: Path) -> None:
    tokens = ",".join(map(str, range(1, 500)))
    arguments = ["--shape", "32,48,4,2", "--tokens", tokens, "--seconds", "0.01", "--out", str(tmp_path / "bench.json")]
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_ext", "bench", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    assert first.startswith("1 tokens: ")
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["complete"] is False
    assert 1 <= len(written["rows"]) < 499
    assert "of limit" in shown


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "8,8,2,3", "0,8,2,1", "1,2,3,4,5"])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shape '"):
        Shape.parse(text)


@pytest.mark.parametrize("arguments", [["--tokens", "1,x"], ["--tokens", "0"], ["--shape", "3"]])
def test_a_wrong_option_is_an_error_before_measuring(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "measurements", lambda *_: pytest.fail("measured"))
    assert inside("bench", *arguments) in (1, 2)


def test_a_picture_without_matplotlib_is_an_error_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(measure, "measurements", lambda *_: pytest.fail("measured"))
    assert inside("bench", *SMALL, "--png", str(tmp_path / "bench.png")) == 1
    assert "need matplotlib: pip install 'moe_ext[report]'" in capsys.readouterr().err


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_quantised_weights_are_measured_beside_those_of_the_dtype(weights: WeightType) -> None:
    (row,) = measurements(Shape(256, 128, 4, 2), torch.bfloat16, "cpu", [3], 0.01, weights)
    assert row.tokens == 3
    assert row.record["weights"] == weights
    assert set(row.peers) == {"bfloat16", "transformers"}
    experts = row.record["MB read"] * 1e6 / (3 * 256 * 128 * (0.5 if weights in ("int4", "mxfp4") else 1.0))
    assert 2 <= experts // 1 <= 4
    assert 1.0 < experts / (experts // 1) < 1.07  # and their scales


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and moe_ext built with CUDA kernels")
@pytest.mark.parametrize("weights", [None, *WEIGHT_TYPES])
def test_a_row_is_measured_on_cuda(small_cache: None, weights: WeightType | None) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measure, "MATMUL", 64)
        (row,) = measurements(Shape(256, 128, 4, 2), torch.bfloat16, "cuda", [3], 0.01, weights)
    assert row.tokens == 3
    assert min(row.ours, row.limit, *row.peers.values()) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device: cuda needs a CUDA device"):
        next(measurements(Shape(8, 8, 2, 1), torch.float32, "cuda", [1], 0.01))
