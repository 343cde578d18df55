"""Run by tests in vLLM's environment, which has no moe_ext: greedy tokens of checkpoints, or why there are none.

    python vllm_generate.py JOBS.json RESULTS.json TOKENS

JOBS: name to {"checkpoint": folder, "prompts": [[token, ...], ...], "settings": {what else LLM is given}}.
RESULTS: name to {"tokens": [[token, ...], ...]}, or to {"error": text} for a checkpoint that vLLM does not load.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def generated(
    checkpoint: str, prompts: list[list[int]], tokens: int, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    common = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "max_model_len": 128, "seed": 0}
    try:
        model = LLM(checkpoint, **{**common, **(settings or {})})
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    results = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    return {"tokens": [list(result.outputs[0].token_ids) for result in results]}


def main() -> None:
    jobs, results, tokens = sys.argv[1:]
    done = {name: generated(**job, tokens=int(tokens)) for name, job in json.loads(Path(jobs).read_text()).items()}
    Path(results).write_text(json.dumps(done))


if __name__ == "__main__":
    main()
