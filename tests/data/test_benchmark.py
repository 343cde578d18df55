"""benchmarks/calibration.py runs, and says what it ran; how fast is its own matter."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT


def test_the_benchmark_reads_what_it_says_and_writes_a_dated_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (ROOT / "benchmarks" / "calibration.py").exists():
        pytest.skip("needs the package's source")
    script: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "calibration.py"))
    written = tmp_path / "result.json"
    small = ["--hidden", "64", "--layers", "1", "--experts", "4", "--rounds", "1", "--dtype", "float32"]
    script["main"]([*small, "--lengths", "16", "64", "--tokens", "700", "--file-sizes", "--write", str(written)])
    result = json.loads(written.read_text())
    assert [(row["tokens a row"], row["tokens"]) for row in result["rows"]] == [(16, 700), (64, 700)]
    assert all(0 <= row["waiting"] <= 1 for row in result["rows"])
    assert result["setting"]["tokens"] == 700
    assert result["date"]
    assert "tokens a row" in capsys.readouterr().out
