"""The quantised weights of a checkpoint folder, whatever the format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_ext.checkpoints.bitsandbytes import bitsandbytes_weights
from moe_ext.checkpoints.compressed import compressed_weights
from moe_ext.checkpoints.float8 import float8_weights
from moe_ext.checkpoints.gptq import gptq_weights
from moe_ext.checkpoints.modelopt import modelopt_weights
from moe_ext.checkpoints.mxfp4 import mxfp4_weights
from moe_ext.checkpoints.quantised_weight import QuantisedWeight
from moe_ext.checkpoints.stored_tensors import CheckpointError, StoredTensor
from moe_ext.storage.formats import parse_json

MODELOPT = "hf_quant_config.json"
"""Where ModelOpt says how it quantised, in the place of the config or beside it."""

_NAMES = {
    "fp8": "float8",
    "fbgemm_fp8": "float8",
    "mxfp4": "MXFP4",
    "modelopt": "ModelOpt",
    "modelopt_fp4": "ModelOpt",
    "compressed-tensors": "compressed-tensors",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
}


def read_quantisation(folder: str | Path, config: Any) -> dict[str, Any] | None:
    """What a folder says of how its weights are quantised, in the config or in ModelOpt's own file; None: nothing.

    Raises:
        CheckpointError: it is no JSON object.
    """
    declared = getattr(config, "quantization_config", None)
    if declared is not None:
        found = declared if isinstance(declared, dict) else declared.to_dict()
        return dict(found)
    path = Path(folder) / MODELOPT
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    inner = content.get("quantization") if isinstance(content, dict) else None
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path}: has no 'quantization'")
    return {**inner, "quant_method": "modelopt"}


def format_name(quantisation: Mapping[str, Any]) -> str:
    """What messages call the format."""
    method = quantisation.get("quant_method")
    return _NAMES.get(str(method), str(method)[:40])


def quantised_weights(
    folder: str | Path, quantisation: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, QuantisedWeight]:
    """The weights of a folder that are stored in another form than as numbers of the model's type, by the key that they
    would have if they were not.

    Raises:
        ValueError: a format that is not read, with a tensor's name; or a weight without its scales.
        CheckpointError: tensors whose shapes do not fit each other.
    """
    method = quantisation.get("quant_method")
    match method:
        case "fp8" | "fbgemm_fp8":
            weights = float8_weights(folder, quantisation, stored)
        case "mxfp4":
            weights = mxfp4_weights(folder, stored)
        case "modelopt" | "modelopt_fp4":
            weights = modelopt_weights(folder, quantisation, stored)
        case "compressed-tensors":
            weights = compressed_weights(folder, quantisation, stored)
        case "gptq" | "awq":
            weights = gptq_weights(folder, quantisation, stored)
        case "bitsandbytes":
            weights = bitsandbytes_weights(folder, quantisation, stored)
        case _:
            experts = [name for name, tensor in stored.items() if ".experts" in name]
            first = next((name for name in experts if not stored[name].dtype.is_floating_point), None)
            raise ValueError(
                f"{folder} is quantised ({str(method)[:100]!r}): {first or next(iter(experts or stored), '')} is in a "
                f"format that is not read from files; read are {', '.join(_NAMES)}, and GGUF files"
            )
    found = {weight.name: weight for weight in weights}
    for weight in weights:
        if weight.name in stored and weight.name not in weight.pieces:
            raise CheckpointError(f"{folder}: holds {weight.name} both as it is and quantised")
    return found
