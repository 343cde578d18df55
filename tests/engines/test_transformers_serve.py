"""``transformers serve`` through engines/transformers/serve.py: a pruned checkpoint that skips, over loopback."""

import sys
from pathlib import Path

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

import moe_ext
from moe_ext.checkpoints.load_save import load_checkpoint, save_checkpoint
from moe_ext.models.blocks import moe_blocks
from tests.engines.server import completed, server
from tests.support.families import keep_of, plan_for
from tests.support.paths import DEMO_MODEL, ROOT

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
PROMPT = "def add(a, b):"


# Small: by default the cache takes most of the machine's memory.
PAGED = ("--continuous-batching", "--cb-block-size", "16", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "64")


@pytest.mark.parametrize("options", [(), PAGED], ids=["one by one", "continuous batching"])
def test_a_server_gives_the_text_of_a_patched_model(options: tuple[str, ...], tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    moe_ext.prune(model, plan_for(model, keep_of(model, "mixtral", fewer=1)))  # layers differ: stock does not load it
    blocks = len(moe_blocks(model))
    moe_ext.patch(model, skip=torch.full((blocks, 1), 0.6))
    save_checkpoint(model, tokenizer, tmp_path / "pruned")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with moe_ext.count_skips(model) as count:
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert 0.1 < count.rate() < 0.9
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    folder = str(tmp_path / "pruned")
    command = [sys.executable, str(ROOT / "engines" / "transformers" / "serve.py"), folder]
    with server([*command, "--device", "cpu", "--dtype", "float32", *options], tmp_path / "log") as address:
        assert completed(address, folder, PROMPT, max_tokens=12) == expected
