"""llama.cpp's converter, as its users call it, and the tokenizers that it wants of a family.

MOE_EXT_LLAMACPP names a folder with an environment that has llama-cpp-python (bin/python; no moe_ext is in it), its
source (source/), where llama.cpp's converter lies, and what the converter needs beside moe_ext's environment
(converter/).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LLAMACPP = Path(os.environ.get("MOE_EXT_LLAMACPP", ""))
OPT_IN = pytest.mark.skipif(not os.environ.get("MOE_EXT_LLAMACPP"), reason="opt-in: make test-llamacpp")
_OF_GLM = ["[gMASK]", "<sop>", "<|user|>", "<|observation|>"]
_SENTENCE_PIECE = """
import sys, sentencepiece
words = (" ".join(f"w{number * line % 97}" for number in range(20)) for line in range(200))
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=words, model_prefix=sys.argv[1], vocab_size=300, byte_fallback=True, model_type="bpe")
"""


def write_tokenizer(folder: Path, family: str = "") -> int:
    """GPT-2's, which the converter knows, from llama.cpp's own tests, with what a family's has beside it; returns its
    number of tokens."""
    from gguf import GGUFReader

    fields = GGUFReader(LLAMACPP / "source/vendor/llama.cpp/models/ggml-vocab-gpt-2.gguf").fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    further = _OF_GLM if family.startswith("glm4") else []
    tokenizer.add_special_tokens(further)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(folder)
    if family in ("ernie4_5_moe", "phimoe"):
        done = _run([sys.executable, "-c", _SENTENCE_PIECE, str(folder / "tokenizer")])
        assert done.returncode == 0, done.stderr[-3000:]
    return len(tokens) + len(further)


def convert(folder: Path, kind: str) -> Path:
    """A folder by llama.cpp's converter, as its users call it."""
    out = folder.with_name(f"{folder.name} {kind}.gguf")
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "phimoe":  # the converter knows it by the name that its authors' folders have
        config["architectures"] = ["PhiMoEForCausalLM"]
        (folder / "config.json").write_text(json.dumps(config))
    script = LLAMACPP / "source/vendor/llama.cpp/convert_hf_to_gguf.py"
    done = _run([sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", kind])
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def _run(call: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(LLAMACPP / "converter")}
    return subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
