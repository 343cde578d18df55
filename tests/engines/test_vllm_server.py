"""vLLM's server with our plugin, over loopback, on one and on two ranks of tensor parallelism. ``make test-vllm``."""

from pathlib import Path

import pytest
import torch

import moe_ext
from moe_ext.checkpoints.load_save import load_checkpoint, write_thresholds
from tests.engines.server import completed, server
from tests.support.paths import DEMO_MODEL
from tests.support.vllm_process import VLLM, environment

pytestmark = pytest.mark.skipif(not VLLM, reason="opt-in: make test-vllm")

TOKENS = 24
PROMPTS = ["The first thing that he saw was", "In the morning, the children went"]


def command(checkpoint: Path, ranks: int) -> list[str]:
    started = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--dtype", "float32"]
    started += ["--tensor-parallel-size", str(ranks), "--enforce-eager", "--max-model-len", "128"]
    return [*started, "--served-model-name", "pruned"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_gives_the_text_of_a_patched_model(ranks: int, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    whole, _ = load_checkpoint(DEMO_MODEL)
    plan = moe_ext.plan(moe_ext.aimer(whole), keep=6)
    moe_ext.prune_checkpoint(DEMO_MODEL, plan, folder, dtype="float32", progress=False)
    write_thresholds(folder, torch.full((4, 1), 0.6), range(4))
    model, tokenizer = load_checkpoint(folder)
    moe_ext.patch(model)
    model.generation_config.eos_token_id = None
    library = str(next(Path(moe_ext.__file__).parent.glob("_C*.so")))
    settings = environment(
        {"MOE_EXT_VLLM_LIBRARY": library, "MOE_EXT_VLLM_COUNT": "0.2", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    )
    with server(command(folder, ranks), tmp_path / "log", environment=settings) as address:
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            with moe_ext.count_skips(model) as count:
                out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
            assert 0.1 < count.rate() < 0.9
            expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert completed(address, "pruned", prompt, max_tokens=TOKENS, ignore_eos=True) == expected
    said = (tmp_path / "log").read_text()
    assert "Using moe_ext's experts kernel" in said
    assert said.count("moe_ext: slots skipped: ") >= ranks
