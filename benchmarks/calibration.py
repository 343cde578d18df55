"""Does text come as fast as a model reads it, and in how much memory?

Makes a random Mixture-of-Experts model and a JSONL file of text, and for rows of several lengths compares tokens a
second of ``moe_ext.calibrate`` on ``moe_ext.data.batches`` with those of the patched model's forward pass alone on
batches that are there already, and with those of calibration on such batches. ``waiting`` is the share of the time in
which calibration waited for text: to be below 2 %. Then reads a small and a large file in a process of its own each:
the peak resident memory is to be the same.

    python benchmarks/calibration.py --write benchmarks/results/DATE-calibration.json

In parts, of which each leaves the other's rows in the file as they are:

    python benchmarks/calibration.py --file-sizes --write DATE-calibration.json  # the speed
    python benchmarks/calibration.py --lengths --write DATE-calibration.json  # the memory
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_ext
from moe_ext.binary import _C
from moe_ext.checkpoints.load_save import read_tokenizer
from moe_ext.models.blocks import input_device
from moe_ext.runtime.batches import check_batch, read_domains
from moe_ext.storage.dated_results import table, write_result
from moe_ext.storage.machine import processor

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "demo_model"
POSITIONS = 32768

READ = """
import sys
import moe_ext
from moe_ext.checkpoints.load_save import read_tokenizer
from moe_ext.storage.machine import peak_resident_bytes
tokens, tokenizer = 0, read_tokenizer(sys.argv[2])
for batch in moe_ext.data.batches(sys.argv[1], tokenizer, window=2048, batch_tokens=16384, ahead=0):
    tokens += int(batch["attention_mask"].sum())
print(tokens, peak_resident_bytes())
"""


def model_of(hidden: int, layers: int, experts: int, dtype: torch.dtype, device: str) -> Any:
    """A random model, patched."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=max(8, hidden // 8),
        num_experts=experts,
        num_experts_per_tok=min(8, experts),
        max_position_embeddings=POSITIONS,
    )
    return moe_ext.patch(Qwen3MoeForCausalLM(config).eval().to(device, dtype))


def write_rows(file: Path, characters: int, size: int) -> None:
    """A JSONL file of so many bytes or a little more, with rows of so many characters of text."""
    rng = random.Random(0)
    texts = [text for text in read_domains([DEMO_MODEL / "calibration"]).values() if len(text) > 1000]
    written = 0
    with file.open("w", encoding="utf-8") as content:
        while written < size:
            row, length = [], 0
            while length < characters:
                text = rng.choice(texts)
                start = rng.randrange(len(text) - 500)
                row.append(text[start : start + min(characters - length, 2000)])
                length += len(row[-1])
            line = json.dumps({"text": "".join(row)}) + "\n"
            content.write(line)
            written += len(line)


def seconds_of_forward(model: Any, batches: Iterable[Any]) -> float:
    begin = time.perf_counter()
    with torch.inference_mode():
        for index, batch in enumerate(batches):
            inputs = check_batch(index, batch, model).inputs
            device = input_device(model)
            model.base_model(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False)
    if input_device(model).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def row_of(model: Any, tokenizer: Any, folder: Path, length: int, tokens: int, batch_tokens: int, rounds: int) -> Any:
    """Tokens a second at rows of so many tokens."""
    file = folder / f"rows-{length}.jsonl"
    write_rows(file, 4 * length, 12 * tokens)  # of which each gives half a window or more
    data = moe_ext.data.batches(
        file, tokenizer, window=length, tokens=tokens, batch_tokens=max(batch_tokens, length), long="cut"
    )
    there = list(data)
    counted = sum(int(batch["attention_mask"].sum()) for batch in there)
    forward: list[float] = []
    observed: list[float] = []
    whole: list[float] = []
    waiting: list[float] = []
    for _ in range(rounds):
        forward.append(seconds_of_forward(model, there))
        for times, batches in ((observed, there), (whole, data)):
            begin = time.perf_counter()
            moe_ext.calibrate(model, batches, progress=False)
            times.append(time.perf_counter() - begin)
        waiting.append(data.waiting)
    plain, alone, all_of_it = (counted / statistics.median(times) for times in (forward, observed, whole))
    return {
        "tokens a row": length,
        "tokens": counted,
        "batches": len(there),
        "forward, tokens/s": plain,
        "calibrate on batches": alone,
        "calibrate on a file": all_of_it,
        "of the forward's": all_of_it / plain,
        "waiting": statistics.median(waiting),
    }


def memory_of(folder: Path, sizes: Sequence[int]) -> list[dict[str, int]]:
    """Peak resident memory of processes that read files of so many bytes."""
    found = []
    for size in sizes:
        file = folder / "memory.jsonl"
        write_rows(file, 4000, size)
        command = [sys.executable, "-c", READ, str(file), str(DEMO_MODEL)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        tokens, peak = map(int, result.stdout.split())
        found.append({"file_bytes": file.stat().st_size, "tokens": tokens, "peak_bytes": peak})
        file.unlink()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 2048, 16384], help="tokens a row")
    parser.add_argument("--tokens", type=int, default=131072, help="of every length")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--file-sizes", type=int, nargs="*", default=[10**7, 10**9], help="bytes, for the memory")
    parser.add_argument("--write", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    model = model_of(given.hidden, given.layers, given.experts, getattr(torch, given.dtype), given.device)
    tokenizer = read_tokenizer(str(DEMO_MODEL))
    before = json.loads(given.write.read_text()) if given.write is not None and given.write.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        rows = [
            row_of(model, tokenizer, Path(name), length, given.tokens, given.batch_tokens, given.rounds)
            for length in given.lengths
        ]
        memory = memory_of(Path(name), given.file_sizes)
    if rows:
        print(table(rows))
    for each in memory:
        print(f"{each['file_bytes'] / 1e6:.0f} MB, {each['tokens']} tokens: peak {each['peak_bytes'] / 1e6:.0f} MB")
    if given.write is not None:
        setting = {name: value for name, value in vars(given).items() if name not in ("write", "file_sizes")}
        if not rows:
            rows, setting = before.get("rows", []), before.get("setting", setting)
        memory = memory or before.get("memory", [])
        write_result(
            given.write,
            "one round" if setting["rounds"] == 1 else f"medians of {setting['rounds']} rounds",
            machine=f"{processor()}, {torch.get_num_threads()} threads",
            variant=_C.active_cpu_variant(),
            setting=setting,
            rows=rows,
            memory=memory,
        )


if __name__ == "__main__":
    main()
