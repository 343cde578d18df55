"""Run by test_llamacpp.py in llama.cpp's environment, which has no moe_ext: files quantised, and logits of files.

    python llamacpp_logits.py JOBS.json RESULTS.npz

JOBS: {"quantise": [[from, to, type], ...], "logits": {name: file}, "tokens": [token, ...]}. RESULTS: by name (T, V)
float32, or nothing for a file that llama.cpp does not load.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy

F32 = 0  # ggml's number; keys and values are kept in float16 otherwise


def quantise(source: str, target: str, kind: int) -> None:
    """Every matrix to one type."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.pure, settings.nthread = kind, True, 1
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize of {source}: {status}")


def logits(file: str, tokens: list[int]) -> "numpy.ndarray[tuple[int, int], numpy.dtype[numpy.float32]]":
    model = llama_cpp.Llama(
        file, n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False, type_k=F32, type_v=F32
    )
    model.eval(tokens)
    return numpy.array(model.scores[: len(tokens)], dtype=numpy.float32)


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for source, target, kind in jobs["quantise"]:
        quantise(source, target, kind)
    results = {}
    for name, file in jobs["logits"].items():
        try:
            results[name] = logits(file, jobs["tokens"])
        except ValueError as error:  # llama.cpp does not load it
            print(f"{name}: {error}", file=sys.stderr)
    numpy.savez(sys.argv[2], allow_pickle=False, **results)


if __name__ == "__main__":
    main()
