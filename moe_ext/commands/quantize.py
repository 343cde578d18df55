"""``moe-ext quantize``: a checkpoint's experts in few bits."""

from pathlib import Path
from typing import Annotated

import typer

from moe_ext.commands.options import Json, TrustRemoteCode, destination
from moe_ext.commands.output import out, print_json
from moe_ext.quantisation.folder import quantize_checkpoint


def quantize(
    model: Annotated[str, typer.Argument(help="Checkpoint folder with float weights.", show_default=False)],
    save_to: Annotated[Path, destination("Folder for the quantised checkpoint.")],
    experts: Annotated[str, typer.Option(help="int8, int4, fp8 or mxfp4.", show_default=False)],
    group_size: Annotated[
        int | None,
        typer.Option(help="Columns that share a scale: int4 32, 64 or 128 (default); fp8 0, a row, or 128, a block."),
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="int4 with zero points.")] = False,
    search_scales: Annotated[
        bool, typer.Option("--search-scales", help="Symmetric int4: the scales with the least error; takes longer.")
    ] = False,
    shard_size: Annotated[float, typer.Option(min=1e-6, help="Gigabytes of weights a file.")] = 5.0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Quantise the experts' weights of a checkpoint folder, from file to file, and write a folder that others load.

    Everything else is copied as it is. int8, int4 and fp8 are stored as compressed-tensors stores them, mxfp4 as
    gpt-oss is published, for other families as compressed-tensors has it. A run that was interrupted goes on when it is
    started again. moe_ext.from_pretrained, and so every command, runs the result on packed weights.
    """
    written = quantize_checkpoint(
        model,
        experts,
        save_to,
        group_size=group_size,
        symmetric=not asymmetric,
        search_scales=search_scales,
        shard_size=int(shard_size * 1e9),
        progress=not as_json,
        trust_remote_code=trust_remote_code,
    )
    before, after = written.weight_bytes_before, written.weight_bytes
    if as_json:
        print_json({"checkpoint": str(save_to), "weight_bytes_before": before, "weight_bytes": after})
    else:
        out.print(f"{before / 1e6:.1f} -> {after / 1e6:.1f} MB of weights: {save_to}")
