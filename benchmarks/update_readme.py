"""Copies measured tables from benchmarks/results into README.md, so that no number in it is typed by hand.

``python benchmarks/update_readme.py`` rewrites the parts between the markers; ``--check`` exits with 1 if they differ
from what the newest results say (a test runs it).
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_ext.demo import cells_of, columns_of
from moe_ext.files import replace_file

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def newest(name: str) -> Path:
    """The latest ``<date>-<name>.json``; dates sort as text."""
    files = sorted(RESULTS.glob(f"????-??-??-{name}.json"))
    if not files:
        raise SystemExit(f"no result {name!r} in {RESULTS}")
    return files[-1]


def demo_table(result: Mapping[str, Any], source: str) -> str:
    domains = list(result["rows"][0]["perplexity"])
    header = columns_of(domains)
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(cells_of(row, domains)) + " |" for row in result["rows"]]
    machine, versions = result["machine"], result["versions"]
    lines += [
        "",
        f"Measured on {result['date']} on {machine['processor']}, {machine['threads']} threads, {machine['variant']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']} "
        f"([{source}](benchmarks/results/{source})). Perplexity on held-out text, lower is better; mean: geometric. "
        f"Decode: tokens/s over the first row's in the same run, batch 1, {result['decode']['dtype']}, median of "
        f"{result['decode']['rounds']} interleaved rounds.",
    ]
    return "\n".join(lines)


def updated(readme: str) -> str:
    source = newest("demo")
    table = demo_table(json.loads(source.read_text(encoding="utf-8")), source.name)
    pattern = re.compile(r"(<!-- demo table -->\n).*?(<!-- end of demo table -->)", re.DOTALL)
    changed, count = pattern.subn(lambda match: match[1] + table + "\n" + match[2], readme)
    if count != 1:
        raise SystemExit("README.md has no place for the demo table")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if README.md is out of date")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = updated(before)
    if check:
        sys.exit(0 if after == before else "README.md is out of date: run python benchmarks/update_readme.py")
    with replace_file(path) as temporary:
        temporary.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
