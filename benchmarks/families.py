"""Which of transformers' families does what? What tests/models/test_every_family.py finds, as a dated result.

    python benchmarks/families.py [--workers 2] [--output benchmarks/results/<date>-families.json]

The tests record every job of every family with its outcome: "yes", or the reason that a user is told. If one fails,
nothing is written.
"""

import argparse
import datetime
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from update_tables import RESULTS, ROOT

from moe_ext.storage.dated_results import write_result

TESTS = "tests/models/test_every_family.py"
WHAT = "every family of the installed transformers on a tiny random model of its real config class, on the CPU"


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """Of every family the jobs that tests recorded, from pytest's JUnit XML."""
    found: dict[str, dict[str, str]] = {}
    for each in ElementTree.parse(report).iter("property"):
        family, _, job = each.attrib["name"].partition(" ")
        found.setdefault(family, {})[job] = each.attrib["value"]
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="processes that run tests")
    date = datetime.date.today().isoformat()
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date}-families.json")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # The test of the table is about the result that is written here.
        chosen = ["-k", "not test_the_table", "-n", str(arguments.workers), f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", TESTS, *chosen, "-o", "junit_family=xunit1"]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            sys.exit("a test failed: no result is written")
        families = outcomes(report)
    families.pop("made_up")
    write_result(arguments.output, WHAT, families=families)


if __name__ == "__main__":
    main()
