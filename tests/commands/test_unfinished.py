"""A file that an interrupted job goes on with is taken for a result by no command."""

from pathlib import Path

import pytest

import moe_ext
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.reconstruction.result import SearchResult, write_layers
from tests.support.batches import five_batches
from tests.support.command_line import inside
from tests.support.families import build


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics, the losses of one layer of three, and a calibration's file from which it would go on."""
    folder = tmp_path_factory.mktemp("files")
    build("mixtral").save_pretrained(folder / "model")
    resume = folder / "calibration.partial"
    moe_ext.calibrate(folder / "model", five_batches(), progress=False, resume=resume).save(folder / "s.safetensors")
    losses = folder / "losses.safetensors"
    moe_ext.search(build("mixtral"), five_batches(), keep=6, progress=False).save(losses)
    found = SearchResult.load(losses)
    write_layers(folder / "search.safetensors", {0: found.losses[0]}, {"search": "{}"})
    return folder


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("report s.safetensors search.safetensors --out page.html", "the search is not finished"),
        ("report search.safetensors --out page.html", "moe_ext.search"),
        ("report calibration.partial --out page.html", "format"),
        ("score search.safetensors", "moe_ext.search"),
        ("score calibration.partial", "format"),
        ("merge s.safetensors calibration.partial --out all.safetensors", "format"),
        ("merge search.safetensors s.safetensors --out all.safetensors", "moe_ext.search"),
        ("prune model search.safetensors --out pruned", "search.safetensors"),
        ("skip model calibration.partial --out skipping", "format"),
    ],
)
def test_an_unfinished_file_is_an_error(
    command: str, says: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    before = sorted(path.name for path in files.iterdir())
    assert inside(*command.split()) == 1
    assert says in capsys.readouterr().err
    assert sorted(path.name for path in files.iterdir()) == before
    assert ExpertStatistics.load("s.safetensors").tokens.max() > 0
