"""``moe-ext bench``: how fast the operators are on this machine."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from moe_ext.bench import measure
from moe_ext.bench.figure import write_speed_figure
from moe_ext.bench.weights import WeightType
from moe_ext.commands.options import Device, Json, TrustRemoteCode, destination
from moe_ext.commands.output import errors, out, print_json
from moe_ext.models.dtypes import DTYPES
from moe_ext.report.canvas import need
from moe_ext.storage.dated_results import result_of, write_result
from moe_ext.storage.files import file_destination


def bench(
    model: Annotated[str | None, typer.Option(help="Take the sizes from a model's config.json.")] = None,
    shape: Annotated[str, typer.Option(help="Sizes of a layer: hidden, intermediate, experts, experts a token.")] = (
        "1024,3584,8,2"
    ),
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, with commas between them.")] = "1,4,16,64,256,1024",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option()] = "bfloat16",
    weights: Annotated[
        WeightType | None, typer.Option(help="Quantise the experts, and compare with weights of --dtype.")
    ] = None,
    activations: Annotated[
        Literal["int8"] | None, typer.Option(help="In 8 bits, with int8, int4 or mxfp4 experts on the CPU.")
    ] = None,
    device: Device = "cpu",
    seconds: Annotated[float, typer.Option(min=0, help="For each number of tokens, about.")] = 3.0,
    save_to: Annotated[Path | None, destination("JSON file to write.")] = None,
    png: Annotated[Path | None, destination("Picture to write (*.png).", "--png")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Time the operators here, beside transformers' experts and the machine's limit. Ctrl-C keeps what was measured."""
    sizes = measure.Shape.parse(shape)
    if model is not None:
        sizes = measure.Shape.of_model(model, trust_remote_code=trust_remote_code)
    counts = [int(count) for count in tokens.split(",") if count.strip().isdigit() and int(count) > 0]
    if not counts or len(counts) != len(tokens.split(",")):
        raise typer.BadParameter(f"--tokens {tokens}: expected numbers of 1 or more with commas between them")
    for path in (save_to, png):
        if path is not None:
            file_destination(path)
    if png is not None:
        need("matplotlib")
    rows: list[measure.Measured] = []
    stopped = False
    try:
        for row in measure.measurements(sizes, DTYPES[dtype], device, counts, seconds, weights, activations):
            rows.append(row)
            errors.print(f"{row.tokens} tokens: {row.ours:.3g} ms, {row.limit / row.ours:.0%} of the limit")
    except KeyboardInterrupt:
        stopped = True
    if not rows:
        raise typer.Exit(130)
    what = "medians of interleaved rounds in one process, caches emptied before every call"
    content = {
        **measure.machine(device),
        "model": model,
        "shape": asdict(sizes),
        "dtype": dtype,
        "weights": weights,
        "activations": activations,
        "complete": not stopped,
        "rows": [row.record for row in rows],
    }
    if save_to is not None:
        write_result(save_to, what, **content)
    kind = dtype if weights is None else f"{weights} weights, {activations or dtype}"
    title = f"H, I, E, K = {', '.join(map(str, asdict(sizes).values()))}; {kind}; {measure.machine(device)['device']}"
    if png is not None:
        write_speed_figure(rows, title, png)
    if as_json:
        print_json(result_of(what, **content))
    else:
        peers = list(dict.fromkeys(name for row in rows for name in row.peers))
        table = Table("tokens", "moe_ext ms", *(f"{name} ms" for name in peers), "limit ms", "of limit", title=title)
        for row in rows:
            times = [f"{row.peers[name]:.3g}" if name in row.peers else "not run" for name in peers]
            table.add_row(str(row.tokens), f"{row.ours:.3g}", *times, f"{row.limit:.3g}", f"{row.limit / row.ours:.0%}")
        out.print(table)
    if stopped:
        errors.print("stopped: what was measured until then is kept")
        raise typer.Exit(130)
