"""Memory does not grow with the data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

READ = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from moe_ext.data import batches, reading
from moe_ext.storage.machine import peak_resident_bytes
reading.SHUFFLED = 200  # the rows that wait to be shuffled fill their room with the smaller file already
tokenizer = Tokenizer(models.WordLevel({"?": 0}, "?"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
words = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
for file in sys.argv[1:]:
    tokens = 0
    for batch in batches(file, words, window=64, batch_tokens=512, seed=0, packing=True, ahead=0):
        tokens += int(batch["counted"].sum())
    print(tokens, peak_resident_bytes())
"""


@pytest.mark.slow
def test_a_file_of_forty_times_the_size_is_read_in_the_same_memory(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{number:x}" * 40 + " " + "word" * 300}) + "\n" for number in range(500)]
    files = [tmp_path / name for name in ("small.jsonl", "large.jsonl")]
    for file, times in zip(files, (1, 40), strict=True):
        file.write_text("".join(rows * times))
    assert files[1].stat().st_size > 24 << 20
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    (few, before), (many, after) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert (few, many) == (2 * 500, 2 * 500 * 40)
    assert after < before + (8 << 20)
