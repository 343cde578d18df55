"""``moe-ext compare``: several checkpoints side by side."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from moe_ext.checkpoints.load_save import read_tokenizer
from moe_ext.commands.options import (
    AllowMissing,
    BatchSize,
    Device,
    Dtype,
    Json,
    Reference,
    Strict,
    TrustRemoteCode,
    Window,
    destination,
)
from moe_ext.commands.output import errors, out, print_json
from moe_ext.commands.reading import Reading, say_counts
from moe_ext.commands.reading_options import reads
from moe_ext.evaluation.compare import Compared, Setting
from moe_ext.evaluation.compare import compare as run_comparison
from moe_ext.evaluation.perplexity import check_finite
from moe_ext.storage.dated_results import result_of, write_result
from moe_ext.storage.files import file_destination
from moe_ext.storage.machine import processor


@reads(windows=False)
def compare(
    models: Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="Folders, or names on the Hub.")],
    reading: Reading,
    save_to: Annotated[Path | None, destination("JSON file to write, for `moe-ext report`.")] = None,
    reference: Reference = None,
    skip: Annotated[bool, typer.Option(help="Apply the skip thresholds that the checkpoints hold.")] = True,
    stock: Annotated[bool, typer.Option("--stock", help="Run transformers' own code instead of moe_ext's.")] = False,
    window: Window = 512,
    stride: Annotated[int | None, typer.Option(min=1, help="Step of the sliding window; half of it if absent.")] = None,
    batch_size: BatchSize = 8,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode for the speed.")] = 64,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    allow_missing: AllowMissing = False,
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """Perplexity per domain, size, decode speed and memory of several checkpoints, each in a process of its own.

    With a reference also the KL divergence from it (nats a token, mean over the domains), the share of tokens that both
    find likeliest, and bits per weight of the reference. A perplexity or divergence that is infinite or no number is
    null in JSON, and the exit code is then 1.
    """
    reading.find()
    if save_to is not None:
        file_destination(save_to)
    # Every checkpoint reads the same texts: conversations as the first one's template writes them.
    texts = reading.texts(read_tokenizer(models[0], trust_remote_code=trust_remote_code) if reading.has_rows else None)
    say_counts(reading.counts)
    setting = Setting(
        skip,
        stock,
        window,
        stride,
        batch_size,
        decode_tokens,
        dtype,
        device,
        strict,
        torch.get_num_threads(),
        trust_remote_code,
        allow_missing,
        reference,
    )
    rows: list[Compared] = []
    for row in run_comparison(models, texts, setting):
        errors.print(f"{row.checkpoint}: perplexity {row.mean:.3f}", highlight=False)
        rows.append(row)
    what = "perplexity on the given text, decode speed of one sequence, largest memory of a process"
    if reference is not None:
        what += ", KL divergence from the reference and agreement with it on the same tokens"
    content = {
        "processor": processor(),
        "setting": asdict(setting),
        "checkpoints": [asdict(row) for row in rows],
    }
    if save_to is not None:
        write_result(save_to, what, **content)
    if as_json:
        print_json(result_of(what, **content))
    else:
        out.print(_table(rows, list(texts)))
    for row in rows:
        check_finite(row.checkpoint, row.perplexity)
        check_finite(row.checkpoint, row.kl or {}, "KL divergence")


def _table(rows: list[Compared], domains: list[str]) -> Table:
    judged = any(row.kl is not None for row in rows)
    against = ("KL (nats)", "top-1 alike", "bits/weight") if judged else ()
    table = Table("checkpoint", "params", "weights", *domains, "mean", *against, "skipped", "tokens/s", "memory")
    for row in rows:
        table.add_row(
            row.checkpoint,
            f"{row.parameters / 1e6:.2f}M",
            f"{row.weight_bytes / 1e6:.1f}MB",
            *(f"{row.perplexity[domain]:.2f}" for domain in domains),
            f"{row.mean:.3f}",
            *((f"{row.mean_kl:.5f}", f"{row.mean_top1:.2%}", f"{row.bits_per_weight:.3f}") if judged else ()),
            f"{row.skip_rate:.1%}",
            f"{row.tokens_per_second:.1f}",
            "not known" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}MB",
        )
    return table
