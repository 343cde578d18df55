"""vLLM loads what ``moe-ext quantize`` writes, and generates what we do. Opt-in: ``make test-vllm``.

vLLM's CPU kernels for quantised experts want AMX. On other processors it says which scheme it found and that no kernel
fits; there its own emulation stands in for the int4 kernel (``vllm_emulated.py``): int4 weights, read and made bfloat16
by vLLM's code, in vLLM's kernel for float experts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import moe_ext
from tests.support.batches import random_tokens
from tests.support.families import build
from tests.support.vllm_process import STOCK, VLLM, generated

pytestmark = pytest.mark.skipif(not VLLM, reason="opt-in: make test-vllm")

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "initializer_range": 0.05,
}
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int4, groups of 32": {"weights": "int4", "group_size": 32},
    "int4, groups of 128": {"weights": "int4", "group_size": 128},
    "int4, zeros": {"weights": "int4", "symmetric": False},
    "fp8, blocks": {"weights": "fp8", "group_size": 128},
}
NO_KERNEL = (
    "No WNA16 MoE backend supports the deployment configuration",
    "Unsupported FP8 MoE backend: NONE",
)
"""What vLLM says once it has found the scheme, and no kernel for it on this processor."""

FAMILIES = ("mixtral", "qwen3_moe")
PROMPTS = [random_tokens(1, 16, seed=seed, vocabulary=256)[0].tolist() for seed in range(3)]
TOKENS = 8
HAS_AMX = torch.cpu._is_amx_tile_supported()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    found = {}
    for family in FAMILIES:
        source = folder / family
        build(family, dtype=torch.bfloat16, **SIZES).save_pretrained(source)
        for name, options in FORMATS.items():
            found[f"{family}, {name}"] = folder / f"{family}, {name}"
            moe_ext.quantize_checkpoint(source, out=found[f"{family}, {name}"], progress=False, **options)
    return found


def said_by_vllm(folder: Path, checkpoints: dict[str, Path], changes: dict[str, str]) -> dict[str, Any]:
    jobs = {
        name: {"checkpoint": str(path), "prompts": PROMPTS, "settings": {"dtype": "bfloat16"}, "scores": True}
        for name, path in checkpoints.items()
    }
    return generated(folder, jobs, TOKENS, {**STOCK, **changes})


@pytest.fixture(scope="module")
def in_vllm(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return said_by_vllm(tmp_path_factory.mktemp("vllm"), checkpoints, {})


@pytest.fixture(scope="module")
def emulated(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    fours = {name: path for name, path in checkpoints.items() if name.startswith("mixtral, int4")}
    return said_by_vllm(tmp_path_factory.mktemp("emulated"), fours, {"MOE_EXT_TEST_EMULATED": "1"})


def check_the_same(folder: Path, said: dict[str, Any]) -> None:
    """Greedy tokens, as far as ours are no tie in bfloat16, and the scores of the prompts."""
    model = moe_ext.patch(moe_ext.from_pretrained(folder)).eval()
    for prompt, tokens, scores in zip(PROMPTS, said["tokens"], said["scores"], strict=True):
        whole = torch.tensor([prompt + tokens])
        with torch.no_grad():
            logits = model(whole).logits[0].float()
        logarithms = logits.log_softmax(-1)
        ours = logarithms[: len(prompt) - 1].gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
        # bfloat16 has 8 bits: a layer's output differs by 2^-8, a logit of about 4 by a few times 2^-6.
        assert float((ours - torch.tensor(scores)).abs().mean()) < 0.05
        for place, token in enumerate(tokens, start=len(prompt) - 1):
            # Some ten steps of bfloat16 at these logits. Numbers read wrongly choose tokens at random: 2 to 3 below.
            assert float(logits[place].max() - logits[place, token]) < 0.3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_vllm_generates_what_we_do(
    name: str, family: str, checkpoints: dict[str, Path], in_vllm: dict[str, Any]
) -> None:
    said = in_vllm[f"{family}, {name}"]
    if "error" in said:
        assert any(known in said["error"] for known in NO_KERNEL), said["error"]
        assert not HAS_AMX or name == "int8", said["error"]
        pytest.skip(f"vLLM has no kernel on this processor: {said['error'][:100]}")
    check_the_same(checkpoints[f"{family}, {name}"], said)


@pytest.mark.parametrize("name", [name for name in FORMATS if "int4" in name])
def test_vllms_own_reading_of_int4_weights_is_ours(
    name: str, checkpoints: dict[str, Path], emulated: dict[str, Any]
) -> None:
    said = emulated[f"mixtral, {name}"]
    assert "error" not in said, said["error"]
    check_the_same(checkpoints[f"mixtral, {name}"], said)
