"""Every command that loads a checkpoint loads it with the same care."""

import inspect
import shutil
from pathlib import Path

import pytest

from moe_ext.commands.main import COMMANDS
from tests.support.checkpoints import rewritten
from tests.support.command_line import inside
from tests.support.paths import DEMO_MODEL

TEXT = str(DEMO_MODEL / "held_out" / "english.txt")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The demo model without its last norm, which transformers would fill in."""
    (tmp_path / "m").mkdir()
    for file in DEMO_MODEL.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / "m")
    rewritten(tmp_path / "m", lambda tensors: tensors.pop("model.norm.weight"))
    return tmp_path / "m"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("calibrate", "--text", TEXT, "--out", "s.safetensors"),
        ("calibrate", "--sequential", "--text", TEXT, "--out", "s.safetensors"),
        ("search", "--text", TEXT, "--keep", "6", "--out", "p.json"),
        ("compress", "--text", TEXT, "--size", "0.5", "--out", "half"),
        ("eval", "--text", TEXT),
        ("compare", "--text", TEXT),
        ("generate", "a prompt"),
        ("score", "--criterion", "aimer"),
    ],
    ids=" ".join,
)
def test_a_command_refuses_a_checkpoint_that_lacks_a_tensor(
    command: tuple[str, ...], broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(broken.parent)
    assert inside(command[0], "m", *command[1:]) == 1
    assert "lacks 1 tensors, model.norm.weight" in capsys.readouterr().err.replace("\n", " ")
    assert [path.name for path in broken.parent.iterdir()] == ["m"]


def test_every_command_that_takes_a_model_can_be_told_to_trust_it() -> None:
    takes = {name: set(inspect.signature(command).parameters) for name, command in COMMANDS.items()}
    loading = {name for name, options in takes.items() if options & {"model", "models", "criterion"}}
    assert {"calibrate", "search", "prune", "skip", "eval", "compare", "generate", "score", "plan", "bench"} <= loading
    assert {name for name in loading if "trust_remote_code" not in takes[name]} == {
        "demo"
    }  # one model, of this package
