"""The README says what the committed results say."""

import re
import subprocess
import sys

from moe_ext.models.families import FAMILIES
from tests.support.families import STOCK_ONLY
from tests.support.paths import ROOT


def test_the_readmes_tables_are_those_of_the_committed_results() -> None:
    script = ROOT / "benchmarks" / "update_readme.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_readmes_families_are_those_that_are_tested() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`[^|]*\|([^|]+)\|([^|]+)\|([^|]+)\|([^|]+)\| yes \| yes \|$", text, re.MULTILINE)
    assert {name for name, *_ in rows} == set(FAMILIES)
    for name, patch, calibrate, prune, skip in rows:
        family, stock_only = FAMILIES[name], name in STOCK_ONLY
        assert ("router" in patch) == family.fused, name
        assert ("experts" in patch) == (not stock_only), name
        assert ("fused" in calibrate) == (not stock_only), name
        assert ("per group" in prune) == (family.groups_field is not None), name
        assert ("2 or more" in prune) == (family.fewest_per_group > 1 and family.groups_field is None), name
        assert ("fused" in skip) == family.fused, name


def test_every_file_that_the_readme_links_to_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link.split("#")[0]).exists()] == []
