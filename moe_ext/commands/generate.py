"""``moe-ext generate``: a prompt continued by a patched model."""

from typing import Annotated, Any

import torch
import transformers
import typer

from moe_ext.commands.options import AllowMissing, Device, Dtype, Json, Model, Strict, TrustRemoteCode
from moe_ext.commands.output import print_json
from moe_ext.commands.shared import load
from moe_ext.runtime.batches import prompt_batch
from moe_ext.runtime.patching import patch


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    skip: Annotated[bool, typer.Option(help="Apply the skip thresholds that the checkpoint holds.")] = True,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    allow_missing: AllowMissing = False,
    strict: Strict = True,
    as_json: Json = False,
) -> None:
    """Continue a prompt with a patched model."""
    loaded, tokenizer = load(model, dtype, device, trust_remote_code, allow_missing)
    patch(loaded, skip="config" if skip else None, strict=strict)
    inputs: Any = {name: tensor.to(device) for name, tensor in prompt_batch(prompt, tokenizer, loaded).items()}
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = None if as_json else transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    torch.manual_seed(seed)
    tokens = loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)[0]
    if as_json:
        new = tokens[inputs["input_ids"].shape[1] :]
        print_json({"prompt": prompt, "text": tokenizer.decode(new, skip_special_tokens=True), "tokens": len(new)})
