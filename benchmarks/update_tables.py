"""Copies measured tables from benchmarks/results into the pages that show them, so that no number is typed by hand.

``python benchmarks/update_tables.py`` rewrites the parts between the markers; ``--check`` exits with 1 if they differ
from what the newest results say (a test runs it). The tables of docs/scaling.md are computed, by scaling.py.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_ext.commands.demo import cells_of, columns_of
from moe_ext.storage.dated_results import table
from moe_ext.storage.files import replace_file

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def newest(name: str) -> Path:
    """The latest ``<date>-<name>.json``; dates sort as text."""
    files = sorted(RESULTS.glob(f"????-??-??-{name}.json"))
    if not files:
        raise SystemExit(f"no result {name!r} in {RESULTS}")
    return files[-1]


def demo_table(result: Mapping[str, Any], link: str) -> str:
    domains = list(result["rows"][0]["perplexity"])
    header = columns_of(domains)
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(cells_of(row, domains)) + " |" for row in result["rows"]]
    machine, versions = result["machine"], result["versions"]
    lines += [
        "",
        f"Measured on {result['date']} on {machine['processor']}, {machine['threads']} threads, {machine['variant']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']} "
        f"({link}). Perplexity on held-out text, lower is better; mean: geometric. "
        f"Decode: tokens/s over the first row's in the same run, batch 1, {result['decode']['dtype']}, median of "
        f"{result['decode']['rounds']} interleaved rounds.",
    ]
    return "\n".join(lines)


# What a user may want, how to get it, and the variant of the demo that did it.
WAYS = (
    ("to see what it starts from", "stock transformers", "unpruned, transformers"),
    ("three quarters of the experts' bytes", "`plan --size 0.75`, `prune --refit`", "thin 75% + refit"),
    ("half of them", "`plan --size 0.5`, `prune --refit`", "thin 50% + refit"),
    ("three quarters, and fewer experts a token", "the same, then `skip`", "thin 75% + refit + skip"),
    ("three quarters, no weight changed", "`plan --size 0.75`, `prune`", "thin 75%"),
    ("all weights, faster", "`moe_ext.patch(model)`", "unpruned"),
    ("all weights, fewer experts a token", "`skip`, then `patch`", "skip at the median"),
    ("six of eight experts", "`plan --keep 6 --objective task-specific`, `prune`", "8→6 weighted_ean"),
    ("the same, searched: more work", "`search --keep 6 --method progressive`", "8→6 search progressive"),
    ("a control", "`plan --keep 6 --criterion random`", "8→6 random (mean of 3)"),
)


def demo_summary(result: Mapping[str, Any], link: str) -> str:
    domains = list(result["rows"][0]["perplexity"])
    columns = columns_of(domains)
    shown = [columns.index(column) for column in ("file", "mean", "skipped", "decode")]
    cells = {row["name"]: cells_of(row, domains) for row in result["rows"]}
    lines = ["| you want | do | file | perplexity | skipped | decode |", "|---|---" + "|--:" * len(shown) + "|"]
    lines += [f"| {want} | {do} | " + " | ".join(cells[name][i] for i in shown) + " |" for want, do, name in WAYS]
    machine = result["machine"]
    lines += [
        "",
        f"{result['date']}, {machine['processor']}, {machine['threads']} threads ({link}). Perplexity on held-out text "
        "like the calibration text, lower is better. Decode: tokens/s over the first row's.",
    ]
    return "\n".join(lines)


def counters_tables(result: Mapping[str, Any], link: str) -> str:
    parts = [f"**{name}**\n\n{table(rows)}" for name, rows in result["tables"].items()]
    parts.append(f"{result['date']}, torch {result['versions']['torch']}: {result['what']} ({link}).")
    return "\n\n".join(parts)


def ptxas_table(result: Mapping[str, Any], link: str) -> str:
    spilling = ", ".join(result["spilling_kernels"]) or "no kernel spills"
    return (
        f"{table(result['rows'])}\n\n**hopper_gemm_kernel, instructions**\n\n{table(result['hopper'])}\n\n"
        f"{result['date']}, {result['compiler']}: {spilling} ({link})."
    )


def where(result: Mapping[str, Any]) -> str:
    """Date, machine and versions of a result that was measured on a CPU."""
    return (
        f"{result['date']}, {result['machine']}, {result['variant']} variant, torch {result['versions']['torch']}, "
        f"transformers {result['versions']['transformers']}"
    )


def cpu_table(result: Mapping[str, Any], link: str) -> str:
    note = f"{where(result)}; {result['what']} ({link})."
    return f"{table(result['rows'])}\n\n**skipping, T = 1**\n\n{table(result['skipping'])}\n\n{note}"


def decode_summary(result: Mapping[str, Any], link: str) -> str:
    rows = {row["variant"]: row for row in result["rows"]}
    skipping = rows["moe_ext, skipping"]
    model, _, shape = result["model"].partition(": ")
    return (
        f"Patched, a {model} ({shape}) decodes {rows['moe_ext']['/ grouped_mm']:.2f}x the tokens/s of transformers' "
        f"`grouped_mm`, {skipping['/ grouped_mm']:.2f}x with {skipping['slots skipped']:.0%} of the slots skipped, "
        f"{rows['moe_ext, 50% of the width']['/ grouped_mm']:.2f}x with experts of half the width "
        f"({result['date']}, {result['machine']}; {link})."
    )


def cpu_summary(result: Mapping[str, Any], link: str) -> str:
    rows = []
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        for name, least, most in (("1 to 8", 1, 8), ("16 and 64", 16, 64), ("256 and 1024", 256, 1024)):
            chosen = [row for row in result["rows"] if row["dtype"] == dtype and least <= row["T"] <= most]
            gains = [row["fastest peer / ours"] for row in chosen]
            reads = [row["weights read / bandwidth"] for row in chosen]
            rates = [row["FLOP/s / linear"] for row in chosen]
            rows.append(
                {
                    "dtype": dtype,
                    "tokens": name,
                    "over transformers' fastest": f"{statistics.geometric_mean(gains):.2f}x",
                    "from, to": f"{min(gains):.2f}x, {max(gains):.2f}x",
                    "weights read, of read bandwidth": f"{statistics.geometric_mean(reads):.0%}",
                    "FLOP/s, of torch's linear": f"{statistics.geometric_mean(rates):.0%}",
                }
            )
    shapes = "; ".join(dict.fromkeys(f"({row['H, I, E, K']})" for row in result["rows"]))
    return (
        f"{table(rows)}\n\nGeometric means over the shapes (H, I, E, K) = {shapes}; least and most in the fourth "
        f"column. {where(result)}; {result['what']} ({link})."
    )


SAVED = ("expert bytes a token", "time saved", "bytes saved", "saved time / saved bytes")


def decode_table(result: Mapping[str, Any], link: str) -> str:
    memory = result["memory"]
    thin = ""
    if "thin" in result:  # results before 2026-11-26 have none
        saved = [
            {"thinner experts, patched": row["variant"], **{name: row[name] for name in SAVED}}
            for row in result["thin"]
        ]
        thin = (
            f"\n\n{table(saved)}\n\nTime and bytes of weights that a token saves, as shares of those of the patched "
            "model at full width."
        )
    peaks = {how: f"{memory[how] / 1e6:.0f} MB" for how in ("patched", "unpatched")}
    return (
        f"{table(result['rows'])}{thin}\n\n{result['model']}; {result['what']}. Peak memory of loading and one "
        f"forward: patched {peaks['patched']}, unpatched {peaks['unpatched']}. {where(result)} ({link})."
    )


def search_tables(result: Mapping[str, Any], link: str) -> str:
    """Rows have many columns and are few: they stand as columns."""
    parts = []
    for name, rows in result["tables"].items():
        shown = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
        columns = [list(rows[0]), *shown]
        lines = ["| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True)]
        parts.append("\n".join([f"**{name}**\n", lines[0], "|---" * len(columns) + "|", *lines[1:]]))
    parts.append(f"{where(result)}: {result['what']} ({link}).")
    return "\n\n".join(parts)


def quality_tables(result: Mapping[str, Any], link: str) -> str:
    parts = []
    for name, model in result["models"].items():
        rows = [
            {**row, "size": f"{row['size']:.0%}", "parameters": f"{row['parameters'] / 1e6:.2f}M"}
            for row in model["rows"]
        ]
        outside = [{**row, "size": f"{row['size']:.0%}"} for row in model["out of domain"]]
        parts.append(
            f"**{name}**: unpruned perplexity {model['unpruned']:.2f}, {model['parameters'] / 1e6:.2f}M parameters, "
            f"{model['calibration tokens']:,} calibration tokens\n\n{table(rows)}\n\nOut of domain, of the unpruned "
            f"model's perplexity:\n\n{table(outside)}"
        )
    parts.append(f"{where(result)}: {result['what']} ({link}).")
    return "\n\n".join(parts)


def quality_summary(result: Mapping[str, Any], link: str) -> str:
    """A method a row, a model and size a column."""
    columns: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, model in result["models"].items():
        for row in model["rows"]:
            if row["size"] >= 0.5:
                columns.setdefault(f"{name} {row['size']:.0%}", {})[row["method"]] = row
    methods = dict.fromkeys(method for column in columns.values() for method in column)
    rows = []
    for method in methods:
        cells = {
            column: f"{found[method]['perplexity']:.2f}, {found[method]['KL']:.3f}, {found[method]['top-1']:.0%}"
            if method in found
            else ""
            for column, found in columns.items()
        }
        took = [found[method]["seconds"] for found in columns.values() if "seconds" in found.get(method, {})]
        shown = " to ".join(dict.fromkeys(f"{limit(took):.0f}" for limit in (min, max))) if took else ""
        rows.append({"method": method, "stock": "no" if ", model" in method else "yes", **cells, "seconds": shown})
    sizes = [f"{next(iter(found.values()))['parameters'] / 1e6:.2f}M ({column})" for column, found in columns.items()]
    unpruned = ", ".join(f"{name} {model['unpruned']:.2f}" for name, model in result["models"].items())
    whole = " and ".join(f"{model['parameters'] / 1e6:.2f}M" for model in result["models"].values())
    tokens = " and ".join(dict.fromkeys(f"{model['calibration tokens']:,}" for model in result["models"].values()))
    return (
        f"{table(rows)}\n\nPerplexity, KL divergence from the unpruned model in nats a token, and top-1 agreement with "
        f"it, on held-out text. Unpruned: {unpruned}. Seconds: on one core, from the model and {tokens} tokens of text "
        f"to the result, least and most of the columns. Parameters, and bytes in proportion: {', '.join(sizes)}; "
        f"unpruned {whole}. {where(result)}; {result['what']} ({link})."
    )


def rounding_table(result: Mapping[str, Any], link: str) -> str:
    """A format a row, perplexity, KL divergence and top-1 agreement of every model in a cell."""
    columns = {name: {row["format"]: row for row in model["rows"]} for name, model in result["models"].items()}
    rows = [
        {
            "format": form,
            **{
                name: f"{rows[form]['perplexity']:.2f}, {rows[form]['KL']:.4f}, {rows[form]['top-1']:.1%}"
                for name, rows in columns.items()
            },
        }
        for form in next(iter(columns.values()))
    ]
    floats = ", ".join(f"{name} {model['float']:.2f}" for name, model in result["models"].items())
    return (
        f"{table(rows)}\n\nPerplexity, KL divergence from the float model in nats a token, and top-1 agreement with "
        f"it, on held-out text. Float: {floats}. {where(result)} ({link})."
    )


NOTHING = "nothing to do"
"""What the outcome of a job begins with that has no meaning in a family."""


def families_table(result: Mapping[str, Any], link: str) -> str:
    """A family a row, a job a column; reasons stand below, numbered."""
    families, reasons = result["families"], list[str]()
    jobs = list(dict.fromkeys(job for found in families.values() for job in found))

    def cell(outcome: str) -> str:
        if outcome in ("yes", "one operator", "its own code", ""):
            return outcome
        if outcome not in reasons:
            reasons.append(outcome)
        return f"{'' if outcome.startswith(NOTHING) else 'no '}({reasons.index(outcome) + 1})"

    rows = [
        {"family": f"`{name}`", **{job: cell(found.get(job, "")) for job in jobs}} for name, found in families.items()
    ]
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return f"{table(rows)}\n\n{notes}\n\n{_families_measured(result)} ({link})."


def families_summary(result: Mapping[str, Any], link: str) -> str:
    families = result["families"]
    exceptions = []
    for name, found in families.items():
        by_reason: dict[str, list[str]] = {}
        for job, reason in _missing(found).items():
            by_reason.setdefault(reason, []).append(job)
        for reason, missing in by_reason.items():
            rest = [job for job in found if job != "router" and job not in missing]
            what = ", ".join(missing) if len(missing) <= len(rest) else f"all but {', '.join(rest)}"
            exceptions.append(f"`{name}`: {what} ({reason})")
    whole = sum(not _missing(found) for found in families.values())
    return (
        f"{whole} of the {len(families)} families that transformers {result['versions']['transformers']} routes "
        "through its experts interface do [all that is tested](docs/support.md#every-family), on a tiny random model "
        f"of each ({link}). What does not go: {'; '.join(exceptions)}. Devices and conditions: "
        "[docs/support.md](docs/support.md)."
    )


def _missing(found: Mapping[str, str]) -> dict[str, str]:
    """Jobs that a family does not do, with the reasons."""
    return {
        job: outcome
        for job, outcome in found.items()
        if job != "router" and outcome != "yes" and not outcome.startswith(NOTHING)
    }


def _families_measured(result: Mapping[str, Any]) -> str:
    versions = result["versions"]
    return f"{result['date']}, transformers {versions['transformers']}, torch {versions['torch']}; {result['what']}"


# The place of a table, between markers, and what goes there; a summary is of the result that its name begins with.
README, BENCHMARKS = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
CRITERIA, SUPPORT = ROOT / "docs" / "criteria.md", ROOT / "docs" / "support.md"
QUANTISATION = ROOT / "docs" / "quantisation.md"
PLACES: list[tuple[Path, str, Callable[[Mapping[str, Any], str], str]]] = [
    (README, "demo-summary", demo_summary),
    (README, "decode-summary", decode_summary),
    (README, "families-summary", families_summary),
    (SUPPORT, "families", families_table),
    (BENCHMARKS, "demo", demo_table),
    (BENCHMARKS, "cpu-summary", cpu_summary),
    (BENCHMARKS, "cpu", cpu_table),
    (BENCHMARKS, "decode", decode_table),
    (BENCHMARKS, "search", search_tables),
    (BENCHMARKS, "quality", quality_tables),
    (CRITERIA, "quality-summary", quality_summary),
    (QUANTISATION, "rounding", rounding_table),
    (BENCHMARKS, "cuda-counters", counters_tables),
    (BENCHMARKS, "cuda-ptxas", ptxas_table),
]


def updated(path: Path, text: str) -> str:
    """The text of a page with the newest results in its places."""
    for page, name, render in PLACES:
        if page != path:
            continue
        source = newest(name.removesuffix("-summary"))
        link = f"[{source.name}]({os.path.relpath(source, page.parent)})"
        rendered = render(json.loads(source.read_text(encoding="utf-8")), link)
        begin, end = f"<!-- {name} table -->\n", f"<!-- end of {name} table -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{path} has no place for the {name} table")
        before, rest = text.split(begin)
        text = before + begin + rendered + "\n" + end + rest.split(end)[1]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a page is out of date")
    check = parser.parse_args().check
    for path in dict.fromkeys(page for page, _, _ in PLACES):
        before = path.read_text(encoding="utf-8")
        after = updated(path, before)
        if check and after != before:
            sys.exit(f"{path} is out of date: run python benchmarks/update_tables.py")
        if not check:
            with replace_file(path) as temporary:
                temporary.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
