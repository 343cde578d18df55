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


def result_for(page: Path, name: str) -> tuple[Any, str]:
    """The newest result of a name, and a link to it from a page."""
    source = newest(name)
    return json.loads(source.read_text(encoding="utf-8")), f"[{source.name}]({os.path.relpath(source, page.parent)})"


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


def on_gpu(result: Mapping[str, Any]) -> str:
    """Date, device, versions and kernels of a result that was measured on a GPU."""
    return (
        f"{result['date']}, {result['device']}, torch {result['versions']['torch']}, transformers "
        f"{result['versions']['transformers']}, kernels {result.get('kernels', 'of that day')}"
    )


def choice_of(result: Mapping[str, Any]) -> str:
    """Which kernels a GPU's result chose, where moe_ext has chosen others since."""
    return f" (choice then: {result['choice']})" if "choice" in result else ""


def limits_of(result: Mapping[str, Any]) -> str:
    limits = result["limits"]
    return (
        f"The device reads {limits['read bytes/s'] / 1e12:.2f} TB/s and multiplies "
        f"{limits['matmul FLOP/s'] / 1e12:.0f} TFLOP/s, measured in the same run"
    )


def gpu_table(result: Mapping[str, Any], link: str) -> str:
    def microseconds(row: Mapping[str, Any], name: str) -> str:
        value = row[f"{name} us"]
        return "" if value is None else f"{value:.4g}"

    rows = [
        {
            "H, I, E, K": f"{row['H']}, {row['I']}, {row['E']}, {row['K']}",
            "T": row["T"],
            "limit us": f"{row['roofline us']:.4g}",
            "moe_ext us": microseconds(row, "experts graph"),
            "of limit": f"{row['fraction']:.0%}",
            "grouped_mm us": microseconds(row, "grouped_mm graph"),
            "batched_mm us": microseconds(row, "batched_mm graph"),
            "eager us, no graph": microseconds(row, "eager"),
            "observing": f"{row['experts_observed us'] / row['experts us']:.2f}x",
        }
        for row in result["rows"]
    ]
    return (
        f"{table(rows)}\n\n{result['dtype']}, CUDA graphs. {limits_of(result)}; the limit of a row is the longer of "
        f"its bytes and its FLOPs at these rates. observing: experts_observed over experts, both without a graph. "
        f"{on_gpu(result)}{choice_of(result)}; {result['what']} ({link})."
    )


def by_weights(result: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Mapping[str, Any]]]:
    """Rows by (shape, tokens) and type of weights."""
    found: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault((row["H, I, E, K"], row["T"]), {})[row["weights"]] = row
    return found


def gpu_weights_table(result: Mapping[str, Any], link: str) -> str:
    """A shape and number of tokens a row, a type of weights a column."""
    found = by_weights(result)
    rows = [
        {
            "H, I, E, K": shape,
            "T": tokens,
            **{name: f"{row['us']:.4g} ({row['fraction']:.0%})" for name, row in weights.items()},
            "transformers": f"{next(iter(weights.values()))['peer us']:.4g}",
        }
        for (shape, tokens), weights in found.items()
    ]
    return (
        f"{table(rows)}\n\nMicroseconds, and share of the limit of that type's bytes; activations in "
        f"{result['dtype']}, CUDA graphs; transformers: its fastest graph on {result['dtype']} weights. "
        f"{on_gpu(result)}{choice_of(result)}; {result['what']} ({link})."
    )


def gpu_paths_table(result: Mapping[str, Any], link: str) -> str:
    """Of the layer's own weights: the kernels that can be forced."""
    names = [name.removesuffix(" us") for name in result["rows"][0] if name.endswith(" us")]
    rows = [
        {
            "H, I, E, K": row["H, I, E, K"],
            "T": row["T"],
            **{name: "" if row[f"{name} us"] is None else f"{row[f'{name} us']:.4g}" for name in names},
            "chosen": f"{row['us']:.4g}",
        }
        for row in result["rows"]
        if row["weights"] == result["dtype"]
    ]
    return (
        f"{table(rows)}\n\nMicroseconds as CUDA graphs, {result['dtype']} weights. {on_gpu(result)}{choice_of(result)} "
        f"({link})."
    )


def gpu_decode_table(result: Mapping[str, Any], link: str) -> str:
    batches = list(dict.fromkeys(row["batch"] for row in result["steps"]))
    steps = {(row["variant"], row["batch"]): row for row in result["steps"]}
    prompts = {row["variant"]: row for row in result["prompts"] if row["what"] == "forward"}
    rows = []
    for variant in dict.fromkeys(row["variant"] for row in result["steps"]):
        cells: dict[str, Any] = {"variant": variant}
        for batch in batches:
            row = steps.get((variant, batch))
            cells[f"batch {batch}"] = "" if row is None else f"{row['tokens/s']:.0f} ({row['/ grouped_mm']:.2f}x)"
        cells["prompt"] = f"{prompts[variant]['tokens/s']:.0f}" if variant in prompts else ""
        rows.append(cells)
    calibrated = next(row for row in result["prompts"] if row["what"] == "calibrate")
    skipped = next(row["slots skipped"] for row in result["steps"] if row["slots skipped"])
    return (
        f"{table(rows)}\n\nTokens/s of decode steps as CUDA graphs, and over grouped_mm; tokens/s of a prompt without "
        f"a graph, and {calibrated['tokens/s']:.0f} while it is observed by `calibrate`. Skipping leaves out "
        f"{skipped:.0%} of the slots. {result['model']}. {on_gpu(result)}; {result['what']} ({link})."
    )


def gpu_decode_summary(result: Mapping[str, Any], link: str) -> str:
    steps = {(row["variant"], row["batch"]): row["/ grouped_mm"] for row in result["steps"]}
    batches = list(dict.fromkeys(row["batch"] for row in result["steps"]))

    def gains(variant: str) -> str:
        return ", ".join(f"{steps[variant, batch]:.2f}x" for batch in batches)

    return (
        f"On a GPU, layers of Mixtral-8x7B's sizes, decode steps at batch {', '.join(map(str, batches))} over those of "
        f"`grouped_mm`, all CUDA graphs: patched {gains('whole')}; with half the experts {gains('4 kept')}; with int4 "
        f"experts {gains('int4')} ({on_gpu(result)}; {link})."
    )


def quantised_table(result: Mapping[str, Any], link: str) -> str:
    """A shape and number of tokens a row, a type of weights a column."""
    found = by_weights(result)
    rows = []
    for (shape, tokens), weights in found.items():
        cells: dict[str, Any] = {"H, I, E, K": shape, "T": tokens}
        for name, row in weights.items():
            gain = "" if name == "bfloat16" else f", {row['bfloat16 / this']:.2f}x"
            cells[name] = f"{row['ms']:.3g} ({row['read / bandwidth']:.0%}{gain})"
        first = next(iter(weights.values()))
        cells["transformers"] = f"{first['peer ms']:.3g} ({first['peer']})"
        rows.append(cells)
    speeds = sorted(row["read GB/s"] for row in result["rows"])
    return (
        f"{table(rows)}\n\nMilliseconds; in brackets the share of the time that the machine takes to read these "
        f"weights, at {speeds[0]:.1f} to {speeds[-1]:.1f} GB/s in the same runs, and the gain over bfloat16 weights. "
        f"int4 in groups of 128. {where(result)}; {result['what']} ({link})."
    )


LAYER = "4096, 14336, 8, 2"
"""H, I, E, K of Mixtral-8x7B."""


def quantised_summary(result: Mapping[str, Any], link: str) -> str:
    """Of a processor with AVX-512 BF16, and of one without AVX-512."""
    other_result, other_link = result_for(README, "quantised-avx2")
    return (
        "Quantised experts of Mixtral-8x7B's layer for 1 to 8 tokens, over the bfloat16 operator: with AVX-512 "
        f"{quantised_gains(result)} ({result['date']}, {result['machine']}, {result['variant']}; {link}); with AVX2 "
        f"{quantised_gains(other_result)} ({other_result['date']}, {other_result['machine']}; {other_link})."
    )


def quantised_gains(result: Mapping[str, Any]) -> str:
    gains: dict[str, list[float]] = {}
    for row in result["rows"]:
        if row["H, I, E, K"] == LAYER and row["T"] <= 8 and row["weights"] != "bfloat16":
            gains.setdefault(row["weights"], []).append(row["bfloat16 / this"])
    means = {name: statistics.geometric_mean(found) for name, found in gains.items()}
    return ", ".join(f"{name.replace(', ', ' with ')} {mean:.2f}x" for name, mean in means.items())


def calibration_table(result: Mapping[str, Any], link: str) -> str:
    rows = [
        {
            "tokens a row": row["tokens a row"],
            "forward, tokens/s": f"{row['forward, tokens/s']:.0f}",
            "calibrate, batches there": f"{row['calibrate on batches']:.0f}",
            "calibrate, from the file": f"{row['calibrate on a file']:.0f}",
            "of the forward's": f"{row['calibrate on a file'] / row['forward, tokens/s']:.1%}",
            "waiting for text": f"{row['waiting']:.1%}",
        }
        for row in result["rows"]
    ]
    setting = result["setting"]
    model = f"H {setting['hidden']}, {setting['layers']} layers, {setting['experts']} experts, {setting['dtype']}"
    memory = ", ".join(
        f"{each['file_bytes'] / 1e6:.0f} MB ({each['tokens']:,} tokens) in {each['peak_bytes'] / 1e6:.0f} MB"
        for each in result["memory"]
    )
    peaks = f" Peak memory of a process that reads a file of so many bytes: {memory}." if memory else ""
    return (
        f"{table(rows)}\n\nThe patched Qwen3-MoE has {model}; batches of {setting['batch_tokens']:,} tokens at most; "
        f"{result['what']}.{peaks} {where(result)} ({link})."
    )


def rows_table(result: Mapping[str, Any], link: str) -> str:
    """A result whose rows stand as they are."""
    pages = f", huge pages {'on' if result['huge_pages'] else 'off'}" if "huge_pages" in result else ""
    model = f"{result['model']}; " if "model" in result else ""
    return f"{table(result['rows'])}\n\n{model}{result['what']}{pages}. {where(result)} ({link})."


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
    (README, "quantised-avx512-summary", quantised_summary),
    (README, "gpu-decode-summary", gpu_decode_summary),
    (README, "families-summary", families_summary),
    (SUPPORT, "families", families_table),
    (BENCHMARKS, "demo", demo_table),
    (BENCHMARKS, "cpu-summary", cpu_summary),
    (BENCHMARKS, "cpu", cpu_table),
    (BENCHMARKS, "decode", decode_table),
    (BENCHMARKS, "quantised-avx512", quantised_table),
    (BENCHMARKS, "quantised-avx2", quantised_table),
    (BENCHMARKS, "whole-model", rows_table),
    (BENCHMARKS, "llamacpp", rows_table),
    (BENCHMARKS, "calibration", calibration_table),
    (BENCHMARKS, "search", search_tables),
    (BENCHMARKS, "quality", quality_tables),
    (CRITERIA, "quality-summary", quality_summary),
    (QUANTISATION, "rounding", rounding_table),
    (BENCHMARKS, "gpu", gpu_table),
    (BENCHMARKS, "gpu-weights", gpu_weights_table),
    (BENCHMARKS, "gpu-paths", gpu_paths_table),
    (BENCHMARKS, "gpu-decode", gpu_decode_table),
    (BENCHMARKS, "cuda-counters", counters_tables),
    (BENCHMARKS, "cuda-ptxas", ptxas_table),
]


def updated(path: Path, text: str) -> str:
    """The text of a page with the newest results in its places."""
    for page, name, render in PLACES:
        if page != path:
            continue
        rendered = render(*result_for(page, name.removesuffix("-summary")))
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
