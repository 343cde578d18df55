"""The source distribution holds all that building needs, its metadata suits PyPI, and extras bring what they say."""

import fcntl
import os
import re
import subprocess
import sys
import tarfile
from email import message_from_bytes
from email.message import Message
from importlib import resources
from importlib.metadata import entry_points, metadata, requires
from pathlib import Path

import pytest

import moe_ext
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "moe_ext").exists():
        pytest.skip("needs the package's source")
    pytest.importorskip("build", reason="needs build: pip install '.[dev]'")
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    source = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(source, fcntl.LOCK_EX)  # setuptools builds in the source folder: one of pytest's workers at a time
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        os.close(source)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.tar.gz"))


def names_and_metadata(sdist: Path) -> tuple[set[str], Message]:
    with tarfile.open(sdist) as archive:
        top = f"moe_ext-{moe_ext.__version__}/"
        names = {name.removeprefix(top) for name in archive.getnames()}
        file = archive.extractfile(f"{top}PKG-INFO")
        assert file is not None
        return names, message_from_bytes(file.read())


def test_the_source_distribution_holds_every_source(sdist: Path) -> None:
    names, _ = names_and_metadata(sdist)
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "moe_ext", "setup.py", "pyproject.toml", "LICENSE", ":(top,glob)*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode:
        pytest.skip("needs a git checkout")
    wanted = tracked.stdout.split()
    assert {
        "csrc/moe.h",
        "moe_ext/py.typed",
        "moe_ext/report/page.html",
        "moe_ext/evaluation/tasks/naee_zero_shot.yaml",
    } <= set(wanted)
    assert [name for name in wanted if name not in names] == []


def test_the_metadata_is_what_pypi_takes(sdist: Path) -> None:
    pytest.importorskip("twine", reason="needs twine: pip install '.[dev]'")
    result = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(sdist)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    _, fields = names_and_metadata(sdist)
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Version"] == moe_ext.__version__


def test_the_changelog_has_a_section_for_the_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", moe_ext.__version__)
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\S+) - (?:unreleased|\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    assert moe_ext.__version__ in sections


def test_the_installed_package_holds_what_is_no_python_code() -> None:
    package = resources.files("moe_ext")
    # Without py.typed type checkers take none of the annotations.
    for name in ("py.typed", "_C.pyi", "report/page.html", "evaluation/tasks/naee_zero_shot.yaml"):
        assert package.joinpath(name).is_file(), name


def test_extras_bring_what_they_are_for() -> None:
    extras = set(metadata("moe_ext").get_all("Provides-Extra") or [])
    assert {"data", "report", "eval", "test"} <= extras
    needed = requires("moe_ext") or []
    for package, extra in (
        ("matplotlib", "report"),
        ("jinja2", "report"),
        ("lm-eval", "eval"),
        ("pytest", "test"),
        ("datasets", "data"),
    ):
        assert any(line.startswith(package) and f'extra == "{extra}"' in line for line in needed), package
    assert not any(
        line.startswith(("matplotlib", "lm-eval", "datasets", "pyarrow")) and "extra" not in line for line in needed
    )


def test_lm_eval_finds_the_model_by_its_entry_point() -> None:
    (entry,) = entry_points(group="lm_eval.models", name="moe_ext")
    assert entry.value == "moe_ext.evaluation.harness:PatchedModel"
