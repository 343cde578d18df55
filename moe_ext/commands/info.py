"""``moe-ext info``: build facts, and which kernels would run."""

import platform
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
import typer
from rich.table import Table

from moe_ext.bench.measure import Shape
from moe_ext.binary import _C
from moe_ext.checkpoints.meta_model import skeleton_of
from moe_ext.checkpoints.stored_tensors import stored_tensors
from moe_ext.commands.options import Json, TrustRemoteCode
from moe_ext.commands.output import out, print_json
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.families import FAMILIES
from moe_ext.models.router_formula import shown_router
from moe_ext.runtime.supported import reason_unsupported
from moe_ext.version import __version__


def cuda_kernels(layer: str, dtype: str, weights: str) -> dict[str, str]:
    """By number of tokens, what the experts of a layer "H,I,E,K" run on the current CUDA device, and why."""
    shape = Shape.parse(layer)
    if not torch.cuda.is_available() or not _C.cuda_archs:
        raise typer.BadParameter("--layer is about CUDA kernels: it needs a CUDA device and a build with them")
    sizes = (shape.hidden, shape.intermediate, shape.num_experts, shape.top_k)
    return {f"T = {tokens}": _C.cuda_kernels(tokens, *sizes, dtype, weights) for tokens in (1, 16, 64, 256, 1024, 4096)}


def layers_of(model: Path, trust_remote_code: bool) -> dict[str, str]:
    """What would run the MoE layers of a checkpoint folder, layers that are alike in one line."""
    alike: dict[str, list[str]] = {}
    skeleton = skeleton_of(model, stored_tensors(model), trust_remote_code=trust_remote_code)
    for block in moe_blocks(skeleton.model):
        reason = reason_unsupported(block)
        experts = "the operators" if reason is None else f"transformers' implementation: {reason.split(': ', 1)[-1]}"
        alike.setdefault(f"router: {shown_router(block)}; experts: {experts}", []).append(block.name)
    return {names[0] + (f" and {len(names) - 1} more" if names[1:] else ""): how for how, names in alike.items()}


def info(
    model: Annotated[
        Path | None, typer.Option(help="A checkpoint folder: also what runs its routers and experts, on the CPU.")
    ] = None,
    layer: Annotated[
        str, typer.Option(help="H,I,E,K of a layer: also which CUDA kernels it takes by number of tokens, and why.")
    ] = "",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of that layer.")] = "bfloat16",
    weights: Annotated[
        Literal["int8", "int4", "fp8", "mxfp4"] | None, typer.Option(help="Of that layer, if they are quantised.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Build facts: versions, CPU variants, CUDA architectures, and what would run here."""
    kernels = cuda_kernels(layer, dtype, weights or dtype) if layer else {}
    layers = {} if model is None else layers_of(model, trust_remote_code)
    variants = _C.cpu_variants()
    facts = {
        "moe_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_built_with": _C.torch_built_with,
        "torch_at_least": _C.torch_at_least,
        "transformers": transformers.__version__,
        "compiler": _C.compiler,
        "cpu_variants": {name: "runs here" if runs else "does not run here" for name, runs in variants},
        "cpu_variant_in_use": _C.active_cpu_variant(),
        "threads": torch.get_num_threads(),
        "cuda_archs": _C.cuda_archs or "none: built without CUDA kernels",
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "model_families": list(FAMILIES),
    }
    if kernels:
        facts["cuda_kernels"] = kernels
    if layers:
        facts["layers"] = layers
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = "\n".join(f"{key}: {state}" for key, state in value.items())
        elif isinstance(value, list):
            value = ", ".join(value) or "none"
        table.add_row(name, str(value))
    out.print(table)
