"""What do the ways to scale the weights of kept experts do to a model's predictions?

    python benchmarks/gate_scale.py [--model examples/demo_model] [--output benchmarks/results/<date>-gate-scale.json]

Two ways to run fewer experts a token, each with every `renormalise` that it can have: skipping by thresholds of the
calibration text, and K lowered to 1. Judged on held-out text by perplexity, KL divergence from the whole model (nats a
token) and top-1 agreement with it; each the mean over the domains.
"""

import argparse
from pathlib import Path
from typing import Any

import moe_ext
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.config_section import GateScale
from moe_ext.runtime.batches import read_domains, token_batches
from moe_ext.storage.dated_results import table, write_result

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
QUANTILES = (0.25, 0.5, 0.75)
BY_SKIPPING: tuple[GateScale, ...] = ("kept", "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO, help="a folder with calibration/ and held_out/ in it")
    parser.add_argument("--characters", type=int, default=20_000, help="of every domain of the held-out text")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    whole, tokenizer = load_checkpoint(arguments.model)
    calibration = read_domains([arguments.model / "calibration"])
    held_out = read_domains([arguments.model / "held_out"])
    texts = {domain: text[: arguments.characters] for domain, text in held_out.items()}
    stats = moe_ext.calibrate(whole, token_batches(calibration, tokenizer, window=arguments.window))
    moe_ext.patch(whole, skip=None)
    rows: list[dict[str, Any]] = []

    def judge(setting: str, model: Any, scale: GateScale) -> None:
        with moe_ext.count_skips(model) as count:
            found = moe_ext.divergence(model, whole, texts, tokenizer, window=arguments.window)
        rows.append(
            {
                "setting": setting,
                "renormalise": scale,
                "skipped": count.rate(),
                "perplexity": found.perplexity.mean,
                "KL": found.mean_kl,
                "top-1 alike": found.mean_top1,
                "perplexity of the whole": found.reference_perplexity.mean,
            }
        )

    model, _ = load_checkpoint(arguments.model)
    top_k = moe_blocks(model)[0].top_k
    for quantile in QUANTILES:
        for scale in BY_SKIPPING:
            moe_ext.patch(model, skip=moe_ext.skip_thresholds(stats, quantile), renormalise=scale)
            judge(f"thresholds at {quantile}", model, scale)
    moe_ext.unpatch(model)
    for block in moe_blocks(model):
        block.router.top_k = 1  # type: ignore[assignment]
    for number in range(1, top_k + 1):
        moe_ext.patch(model, skip=None, renormalise=number)
        judge(f"K = 1 in the place of {top_k}", model, number)
    print(table(rows))
    if arguments.output is not None:
        what = "perplexity on held-out text, KL divergence from the whole model and agreement with it"
        write_result(arguments.output, what, model=str(arguments.model), rows=rows)


if __name__ == "__main__":
    main()
