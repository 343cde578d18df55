"""Malformed files of every format are read as something valid or refused in a few words; nothing is written.

``pytest -m fuzz tests/fuzz/test_files.py`` (``make fuzz``) tries ``MOE_EXT_FUZZ_FILES`` files (400) whose seeds follow
from ``MOE_EXT_FUZZ_SEED``, the date if absent. A seed that fails is named; it goes into ``SEEDS``, which every run of
the tests tries.
"""

import datetime
import os
import random
import time
from pathlib import Path

import pytest

from moe_ext.storage.formats import MOST_CHARACTERS
from tests.support.malformed import KINDS, malform

SEEDS: tuple[int, ...] = ()
"""Files that a reader once took wrongly."""

_MOST_SECONDS = 20.0  # on any machine: work that grows with a damaged number takes hours


def check(seed: int, folder: Path) -> str:
    """Reads the file of a seed.

    Returns:
        Its kind, and what came of it.

    Raises:
        AssertionError: it was not read or refused as documented; names the seed.
    """
    chance = random.Random(seed)
    title = chance.choice(list(KINDS))
    kind, here, elsewhere = KINDS[title], folder / "here", folder / "elsewhere"
    here.mkdir(parents=True)
    elsewhere.mkdir()
    kind.write(here)
    kind.read(here / kind.name, elsewhere)  # valid so far
    malform(here / kind.name, chance)
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    begin = time.monotonic()
    refused: Exception | None = None
    try:
        kind.read(here / kind.name, elsewhere)
    except Exception as error:
        refused = error
    where = f"seed {seed}, {title}"
    message = str(refused or "")
    assert refused is None or isinstance(refused, kind.errors), f"{where}: {type(refused).__name__}: {message[:300]}"
    assert len(message) <= MOST_CHARACTERS, f"{where}: a message of {len(message)} characters"
    assert time.monotonic() - begin < _MOST_SECONDS, f"{where}: took {time.monotonic() - begin:.0f} s"
    assert before == {path.name: path.read_bytes() for path in here.iterdir()}, f"{where}: the folder changed"
    return f"{title}: {'read' if refused is None else type(refused).__name__}"


@pytest.mark.parametrize("seed", SEEDS)
def test_files_that_were_once_taken_wrongly_are_not(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


@pytest.mark.fuzz
def test_malformed_files_are_refused_in_a_few_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = int(os.environ.get("MOE_EXT_FUZZ_SEED", datetime.date.today().strftime("%Y%m%d")))
    count = int(os.environ.get("MOE_EXT_FUZZ_FILES", "400"))
    with capsys.disabled():
        print(f"\nMOE_EXT_FUZZ_SEED={first}: {count} malformed files")
    outcomes: dict[str, int] = {}
    failed = []
    for number in range(count):
        try:
            outcome = check(first * 1_000_000 + number, tmp_path / str(number))
        except AssertionError as error:
            failed.append(str(error).splitlines()[0])
            continue
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    with capsys.disabled():
        print("\n".join(f"{times:5} {outcome}" for outcome, times in sorted(outcomes.items())))
    assert not failed, "put these into SEEDS:\n" + "\n".join(failed)
