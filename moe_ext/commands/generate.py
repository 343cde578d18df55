"""``moe-ext generate``: a prompt continued by a patched model."""

from typing import Annotated, Any, Literal

import torch
import transformers
import typer

from moe_ext.commands.options import AllowMissing, Device, Dtype, Json, Model, Strict, TrustRemoteCode
from moe_ext.commands.output import errors, print_json, working
from moe_ext.commands.shared import load
from moe_ext.runtime.batches import prompt_batch
from moe_ext.runtime.compiled_decoding import compile_decoding, tokens_that_repay
from moe_ext.runtime.patching import Activations, patch

Compile = Literal["auto", "always", "never"]

CACHE_STEP = 256
"""Static caches are a multiple of so many tokens long: what one prompt compiled, others of about its length find on the
disk."""


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    skip: Annotated[bool, typer.Option(help="Apply the skip thresholds that the checkpoint holds.")] = True,
    compile_: Annotated[
        Compile,
        typer.Option(
            "--compile",
            help="Compile the step that makes a token, which takes a C++ compiler and half a minute or more. auto: on "
            "the CPU, from so many new tokens on that they repay it: hundreds for a large model, thousands for a small "
            "one; stderr says which.",
        ),
    ] = "auto",
    activations: Annotated[
        Activations | None,
        typer.Option(help="int8: round what int8, int4 or mxfp4 experts multiply to 8 bits; on the CPU."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    allow_missing: AllowMissing = False,
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """Continue a prompt with a patched model."""
    loaded, tokenizer = load(model, dtype, device, trust_remote_code, allow_missing)
    patch(loaded, skip="config" if skip else None, strict=strict, activations=activations)
    inputs: Any = {name: tensor.to(device) for name, tensor in prompt_batch(prompt, tokenizer, loaded).items()}
    compiled = _compiled(loaded, compile_, inputs["input_ids"].shape[1], max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = None if as_json else transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    torch.manual_seed(seed)
    tokens = loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling, **compiled)[0]
    if as_json:
        new = tokens[inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        print_json({"prompt": prompt, "text": text, "tokens": len(new), "compiled": bool(compiled)})


def _compiled(model: Any, how: Compile, prompt: int, new_tokens: int) -> dict[str, Any]:
    """Arguments of ``generate`` for compiled decoding; none where it is not to be, or with ``auto`` cannot be."""
    if how == "never" or (how == "auto" and model.device.type != "cpu"):
        return {}
    if how == "auto" and new_tokens < (repaid := tokens_that_repay(model)):
        errors.print(f"not compiled: repaid from about {repaid} new tokens on (--compile always)", highlight=False)
        return {}
    length = -(-(prompt + new_tokens) // CACHE_STEP) * CACHE_STEP
    try:
        with working("compiling the step that makes a token"):
            return compile_decoding(model, length)
    except (RuntimeError, ValueError) as error:
        if how == "always":
            raise
        errors.print(f"not compiled: {error}", highlight=False)
        return {}
