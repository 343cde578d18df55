"""Run by tests in vLLM's environment, which has no moe_ext: greedy tokens of checkpoints, or why there are none.

    python vllm_generate.py JOBS.json RESULTS.json TOKENS

JOBS: name to {"checkpoint": folder, "prompts": [[token, ...], ...], "settings": {what else LLM is given},
"scores": whether the prompts are scored}. RESULTS: name to {"tokens": [[token, ...], ...]}, with scores also
{"scores": [[logarithm of the probability of a prompt's token, but for the first, ...], ...]}, or to {"error": text}
for a checkpoint that vLLM does not load.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def generated(
    checkpoint: str,
    prompts: list[list[int]],
    tokens: int,
    settings: dict[str, Any] | None = None,
    scores: bool = False,
) -> dict[str, Any]:
    common = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "max_model_len": 128, "seed": 0}
    try:
        model = LLM(checkpoint, **{**common, **(settings or {})})
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    greedy = SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0 if scores else None,
    )
    results = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    done: dict[str, Any] = {"tokens": [list(result.outputs[0].token_ids) for result in results]}
    if scores:
        done["scores"] = [
            [said[token].logprob for token, said in zip(prompt[1:], result.prompt_logprobs[1:], strict=True)]
            for prompt, result in zip(prompts, results, strict=True)
        ]
    return done


def main() -> None:
    if os.environ.get("MOE_EXT_TEST_EMULATED"):
        importlib.import_module("vllm_emulated").install()  # beside this script
    jobs, results, tokens = sys.argv[1:]
    done = {name: generated(**job, tokens=int(tokens)) for name, job in json.loads(Path(jobs).read_text()).items()}
    Path(results).write_text(json.dumps(done))


if __name__ == "__main__":
    main()
