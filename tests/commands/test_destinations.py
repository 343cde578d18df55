"""No command writes over what it reads, over another of its results, or where there is no place for a file."""

import errno
import os
from pathlib import Path

import pytest
import torch
import typer

import moe_ext.storage.files
from moe_ext.calibration.statistics import ExpertStatistics
from tests.support.command_line import inside
from tests.support.paths import DEMO_MODEL

LAYERS = tuple(f"model.layers.{layer}.mlp" for layer in range(2))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with statistics, a text, and a checkpoint that a link leads to."""
    monkeypatch.chdir(tmp_path)
    stats = ExpertStatistics.zeros("mixtral", LAYERS, 4, 1, "softmax")
    stats.tokens += 4
    stats.moments[:, :, 0, 0] = torch.tensor([2.0, 1.0, 1.0, 0.0])
    stats.save("s.safetensors")
    Path("text").mkdir()
    Path("text/x.txt").write_text("word")
    Path("m").mkdir()
    Path("m/config.json").write_text("{}")
    Path("m/model.safetensors").write_text("weights")
    Path("blob").write_text("weights")
    Path("m/tokenizer.json").symlink_to("../blob")
    Path("link").symlink_to("s.safetensors")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("plan s.safetensors --keep 2 --out s.safetensors", "is what the command reads (statistics)"),
        ("plan s.safetensors --keep 2 --out link", "is what the command reads (statistics)"),
        ("plan m --criterion aimer --keep 2 --out m/plan.json", "is in the folder that the command reads"),
        ("merge s.safetensors s.safetensors --out s.safetensors", "is what the command reads (statistics)"),
        ("calibrate m --text text/x.txt --out text/x.txt", "is what the command reads (text)"),
        ("calibrate m --text text --out text/x.txt", "is in the folder that the command reads"),
        ("calibrate m --text text --out text/y.txt", "is in the folder that the command reads"),
        ("calibrate m --text text --out m/model.safetensors", "is in the folder that the command reads"),
        ("calibrate m --text text --out m/new.safetensors", "is in the folder that the command reads"),
        ("calibrate m --text text --out blob", "is in the folder that the command reads"),
        ("search m --text text --keep 2 --out p.safetensors", "--out and --losses are both"),
        ("search m --text text --keep 2 --out p.json --losses p.json", "--out and --losses are both"),
        ("search m --text text --keep 2 --out m/p.json", "is in the folder that the command reads"),
        ("search m --text text --keep 2 --out p.json --losses text/x.txt", "is in the folder that the command reads"),
        ("prune m s.safetensors --out m", "is what the command reads (model)"),
        ("prune m s.safetensors --out m/pruned", "is in the folder that the command reads"),
        ("skip m s.safetensors --out m/skipping", "is in the folder that the command reads"),
        ("compare m --text text --out m/config.json", "is in the folder that the command reads"),
        ("report s.safetensors --out s.safetensors", "is what the command reads (statistics)"),
        ("report s.safetensors blob --out blob", "is what the command reads (files)"),
        ("report s.safetensors --out page --png page", "--out and --png are both"),
    ],
)
def test_an_output_that_is_an_input_or_another_output_is_wrong_usage(
    command: str, says: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(here)
    monkeypatch.setenv("COLUMNS", "300")
    assert inside(*command.split()) == 2
    assert says in capsys.readouterr().err
    assert content(here) == before


@pytest.mark.slow
@pytest.mark.parametrize("place", ["/dev/null", "fifo", "to-null"])
@pytest.mark.parametrize(
    "command",
    [
        "plan s.safetensors --keep 2 --out",
        "merge s.safetensors --out",
        "report s.safetensors --out",
        "calibrate m --text text --out",
        "search m --text text --keep 2 --out p.json --losses",
        "prune m s.safetensors --out",
        "bench --out",
    ],
)
def test_what_is_no_file_is_not_replaced(
    command: str, place: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo("fifo")
    Path("to-null").symlink_to("/dev/null")
    assert inside(*command.split(), place) == 1
    assert "is a device, a FIFO or a socket" in capsys.readouterr().err
    assert Path("fifo").is_fifo()
    assert Path("/dev/null").is_char_device()


def test_a_linked_output_is_written_where_the_link_leads_and_text_folders_take_other_files(here: Path) -> None:
    Path("to-plan").symlink_to("text/plan.json")
    assert inside("plan", "s.safetensors", "--keep", "2", "--out", "to-plan") == 0
    assert Path("to-plan").is_symlink()
    assert Path("text/plan.json").is_file()
    # Found beyond the check of destinations: the text is of one word, the checkpoint of none.
    assert inside("calibrate", "m", "--text", "text", "--out", "text/s.safetensors") == 1


def test_a_failure_after_the_result_is_there_says_that_it_is(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        if path.is_dir():
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(moe_ext.storage.files, "flush_to_disk", fails)
    assert inside("plan", "s.safetensors", "--keep", "2", "--out", "plan.json") == 1
    assert "plan.json is there and whole all the same" in capsys.readouterr().err
    assert Path("plan.json").is_file()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr("moe_ext.commands.decide.removed_experts", lambda plan: 1 / 0)
    assert inside("plan", "s.safetensors", "--keep", "2", "--out", "other.json") == 1
    assert "other.json is there and whole all the same" in capsys.readouterr().err

    def stops(plan: object) -> None:
        raise typer.Exit(3)  # as bench does, which says by itself what it kept

    monkeypatch.setattr("moe_ext.commands.decide.removed_experts", stops)
    assert inside("plan", "s.safetensors", "--keep", "2", "--out", "third.json") == 3
    assert capsys.readouterr().err == ""


def test_the_demo_may_write_around_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inside("demo", "--model", str(tmp_path), "--out", str(DEMO_MODEL.parents[1])) == 1
    assert "is not the demo model" in capsys.readouterr().err
