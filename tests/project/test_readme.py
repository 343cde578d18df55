"""The README, and the pages that show tables beside it, say what the committed results and the records say."""

import re
import subprocess
import sys

import pytest

from moe_ext.models.families import FAMILIES
from tests.support.families import OWN_ROUTER, STOCK_ONLY
from tests.support.paths import ROOT


@pytest.mark.slow
def test_tables_are_those_of_the_committed_results() -> None:
    script = ROOT / "benchmarks" / "update_tables.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_supported_families_are_those_that_are_tested() -> None:
    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`[^|]*\|([^|]+)\|([^|]+)\|([^|]+)\|([^|]+)\| yes \| yes \|$", text, re.MULTILINE)
    assert {name for name, *_ in rows} == set(FAMILIES)
    for name, patch, calibrate, prune, skip in rows:
        family, stock_only = FAMILIES[name], name in STOCK_ONLY
        assert ("router" in patch) == (name not in OWN_ROUTER), name
        assert ("experts" in patch) == (not stock_only), name
        assert ("fused" in calibrate) == (not stock_only), name
        assert ("per group" in prune) == (family.groups_field is not None), name
        assert ("2 or more" in prune) == (family.fewest_per_group > 1 and family.groups_field is None), name
        assert ("fused" in skip) == (name not in OWN_ROUTER), name


def test_the_readme_names_every_family() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| models |"))
    assert set(re.findall(r"`(\w+)`", row)) == set(FAMILIES)


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
