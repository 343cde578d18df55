"""Memory does not grow with the data."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
tokens = 0
for batch in batches(sys.argv[1], words, window=64, batch_tokens=512, seed=0, packing=True, ahead=0):
    tokens += int(batch["counted"].sum())
print(tokens, peak_resident_bytes())
"""


def test_a_file_of_forty_times_the_size_is_read_in_the_same_memory(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{number:x}" * 40 + " " + "word" * 300}) + "\n" for number in range(500)]
    found = []
    for times in (1, 40):
        file = tmp_path / f"{times}.jsonl"
        file.write_text("".join(rows * times))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-c", READ, str(file)], capture_output=True, text=True, check=True, env=environment
        )
        tokens, peak = map(int, result.stdout.split())
        assert tokens == 2 * 500 * times
        found.append(peak)
    assert file.stat().st_size > 24 << 20
    assert found[1] < found[0] + (8 << 20)
