"""Which method keeps most of a model's quality at the same number of expert parameters?

    python benchmarks/quality.py [--only channels] [--output benchmarks/results/<date>-quality.json]

Models that the output file has already, and that are not judged this time, stay in it. With --seconds nothing is
judged: the seconds that every method takes from the model and the text to the pruned model are added to the rows of the
output file; to be run alone on a machine.

On two small, really trained models in examples/: the demo Mixtral (8 experts, top-2) and a fine-grained Qwen3-MoE (16
experts, top-4). Every method that removes experts or channels, at three sizes, each run in three ways:

- calibrated on the first half of the calibration text of all five domains; judged on held-out text (perplexity, KL
  divergence from the unpruned model, top-1 agreement), and on both halves of the calibration text: how much worse than
  the seen half the held-back one fares, each against the unpruned model, shows what was fitted to the text alone;
- out of domain: calibrated on programs and judged on prose, and the other way round.

Small, undertrained models: what is measured here ranks methods on these two, and nothing else.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import moe_ext
from moe_ext.binary import _C
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.decision.plan import plan as plan_from
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.expert_width import width_of
from moe_ext.runtime.batches import read_domains, token_batches
from moe_ext.storage.dated_results import table, write_result
from moe_ext.storage.machine import processor

MODELS = ("demo_model", "fine_grained_model")
SIZES = (0.75, 0.5, 0.25)
WINDOW, STRIDE, BATCH = 256, 192, 16
CHARACTERS = 12_000  # of each held-out domain
CHARACTERS_OF_HALVES = 6_000
MULTIPLE = 8  # of widths: these models are narrow
FOLDS = ((("python", "c", "javascript"), ("english", "french")), (("english", "french"), ("python", "c", "javascript")))


@dataclass
class Case:
    """A model and the text that methods calibrate on."""

    model: PreTrainedModel
    batches: list[dict[str, Tensor]]
    found: dict[str, PruningPlan] = field(default_factory=dict)  # of searches, which take long

    @cached_property
    def stats(self) -> ExpertStatistics:
        return moe_ext.calibrate(self.model, self.batches, channels="gram", progress=False)

    def kept(self, size: float) -> int:
        return round(size * moe_blocks(self.model)[0].num_experts)

    def by_criterion(self, criterion: str, size: float) -> PruningPlan:
        seed = 0 if criterion == "random" else None
        return plan_from(moe_ext.score(self.stats, criterion, seed=seed), keep=self.kept(size))

    def searched(self, size: float, **options: Any) -> PruningPlan:
        job = f"{size} {options}"
        if job not in self.found:
            found = moe_ext.search(self.model, self.batches, keep=self.kept(size), progress=False, **options)
            self.found[job] = found.plan
        return self.found[job]

    def thinner(self, size: float, select: Any) -> PruningPlan:
        return moe_ext.thin_plan(self.stats, size=size, multiple=MULTIPLE, select=select)

    def randomly_thinner(self, size: float) -> PruningPlan:
        """The same number of channels, without looking."""
        plan = self.thinner(size, "energy")
        assert plan.channels is not None
        blocks, generator = moe_blocks(self.model), torch.Generator().manual_seed(0)
        kept = [
            torch.rand(block.num_experts, width_of(block), generator=generator)
            .argsort(1)[:, : plan.channels.width(layer)]
            .sort(1)
            .values
            for layer, block in enumerate(blocks)
        ]
        channels = KeptChannels.of(kept, plan.channels.intermediate_size)
        return PruningPlan.of(self.stats.layout, plan.keep, plan.made_by, channels)

    def both(self, size: float) -> PruningPlan:
        """Three quarters of the experts, and the rest in channels."""
        fewer = self.by_criterion("weighted_ean", 0.75)
        return moe_ext.thin_plan(self.stats, size=size, plan=fewer, multiple=MULTIPLE)


Method = Callable[[Case, float], PruningPlan]
EXPERTS: dict[str, Method] = {
    "random experts": lambda case, size: case.by_criterion("random", size),
    "frequency": lambda case, size: case.by_criterion("frequency", size),
    "man": lambda case, size: case.by_criterion("man", size),
    "reap": lambda case, size: case.by_criterion("reap", size),
    "weighted_ean": lambda case, size: case.by_criterion("weighted_ean", size),
    "hope": lambda case, size: case.by_criterion("hope", size),
    "search layerwise": lambda case, size: case.searched(size),
    "search layerwise, model": lambda case, size: case.searched(size, budget="model"),
    "search fisher, equal": lambda case, size: case.searched(size, loss="fisher", budget="layer"),
    "search fisher, model": lambda case, size: case.searched(size, loss="fisher"),
}
CHANNELS: dict[str, Method] = {
    "random channels": lambda case, size: case.randomly_thinner(size),
    "energy": lambda case, size: case.thinner(size, "energy"),
    "obs": lambda case, size: case.thinner(size, "obs"),
    "experts, then channels": lambda case, size: case.both(size),
}
REFITTED = ("weighted_ean", "search fisher, model", *CHANNELS)
OUT_OF_DOMAIN = ("weighted_ean", "search fisher, model", "energy", "obs")  # and the same refitted


def ways(only: str | None, without: Sequence[str] = ()) -> Iterator[tuple[str, Method, bool, float]]:
    """Name, method, whether its result is refitted, and size."""
    kinds = {"experts": EXPERTS, "channels": CHANNELS}
    for size in SIZES:
        for kind, methods in kinds.items():
            if only not in (None, kind) or (kind == "experts" and size < 0.5):
                continue
            for name, method in methods.items():
                if name in without or (name == "experts, then channels" and size > 0.5):
                    continue
                yield name, method, False, size
                if name in REFITTED:
                    yield f"{name} + refit", method, True, size


class Judge:
    """A model, its texts, and what the unpruned model makes of them."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.model, self.tokenizer = load_checkpoint(folder)
        self.held_out = {name: text[:CHARACTERS] for name, text in read_domains([folder / "held_out"]).items()}
        calibration = read_domains([folder / "calibration"])
        self.seen = {name: text[: len(text) // 2] for name, text in calibration.items()}
        self.held_back = {name: text[len(text) // 2 :] for name, text in calibration.items()}
        self.calibration = calibration
        self.reference = scratch / f"{folder.name}.safetensors"
        self.unpruned = moe_ext.save_predictions(
            self.model, self.held_out, self.tokenizer, self.reference, window=WINDOW, stride=STRIDE, batch_size=BATCH
        )
        self.of_halves = [self.perplexity(self.model, half) for half in self.halves]

    @property
    def halves(self) -> list[dict[str, str]]:
        halves = (self.seen, self.held_back)
        return [{name: text[:CHARACTERS_OF_HALVES] for name, text in half.items()} for half in halves]

    def batches(self, texts: Mapping[str, str]) -> list[dict[str, Tensor]]:
        return list(token_batches(dict(texts), self.tokenizer, window=WINDOW, batch_size=BATCH))

    def perplexity(self, model: PreTrainedModel, texts: Mapping[str, str]) -> float:
        return moe_ext.perplexity(model, texts, self.tokenizer, window=WINDOW, stride=STRIDE, batch_size=BATCH).mean

    def pruned(self, case: Case, method: Method, refit: bool, size: float) -> PreTrainedModel:
        """The patched result."""
        plan = method(case, size)
        model = copy.deepcopy(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # few tokens for some experts: seen in the numbers
            moe_ext.prune(model, plan, refit=case.batches if refit else None)
        return moe_ext.patch(model)

    def row(self, case: Case, name: str, method: Method, refit: bool, size: float) -> dict[str, Any]:
        model = self.pruned(case, method, refit, size)
        found = moe_ext.divergence(
            model, self.reference, self.held_out, self.tokenizer, window=WINDOW, stride=STRIDE, batch_size=BATCH
        )
        halves = [self.perplexity(model, half) for half in self.halves]
        seen, held_back = (after / before for after, before in zip(halves, self.of_halves, strict=True))
        return {
            "size": size,
            "method": name,
            "perplexity": found.perplexity.mean,
            "KL": found.mean_kl,
            "top-1": found.mean_top1,
            "seen half, of unpruned": seen,
            "held-back half, of unpruned": held_back,
            "parameters": model.num_parameters(),
        }


def seconds(judge: Judge, only: str | None, without: Sequence[str]) -> dict[str, float]:
    """From the model and the text to the pruned model, by size and method; a calibration of its own in each."""
    found, batches = {}, judge.batches(judge.seen)
    for name, method, refit, size in ways(only, without):
        channels: Any = {
            "energy": "energy",
            "random channels": "energy",
            "experts, then channels": "energy",
            "obs": "gram",
        }
        case, begin = Case(judge.model, batches), time.perf_counter()
        if not name.startswith("search"):
            case.stats = moe_ext.calibrate(
                judge.model, batches, channels=channels.get(name.removesuffix(" + refit")), progress=False
            )
        judge.pruned(case, method, refit, size)
        found[f"{size} {name}"] = time.perf_counter() - begin
        print(f"{size} {name}: {found[f'{size} {name}']:.1f} s", flush=True)
    return found


def out_of_domain(judge: Judge, only: str | None, without: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Geometric means over domains that were not calibrated on, as multiples of the unpruned model's."""
    cases = [Case(judge.model, judge.batches({name: judge.calibration[name] for name in seen})) for seen, _ in FOLDS]
    texts = [{name: judge.held_out[name] for name in judged} for _, judged in FOLDS]
    before = [judge.perplexity(judge.model, each) for each in texts]
    for name, method, refit, size in ways(only, without):
        if name.removesuffix(" + refit") not in OUT_OF_DOMAIN:
            continue
        ratios = []
        for case, each, unpruned in zip(cases, texts, before, strict=True):
            model = judge.pruned(case, method, refit, size)
            ratios.append(judge.perplexity(model, each) / unpruned)
        yield {
            "size": size,
            "method": name,
            "programs to prose": ratios[0],
            "prose to programs": ratios[1],
            "mean": math.exp(statistics.fmean(map(math.log, ratios))),
        }


def write(path: Path, models: dict[str, Any]) -> None:
    write_result(
        path,
        f"benchmarks/quality.py: {CHARACTERS} characters of each of five held-out domains, windows of {WINDOW}",
        machine=processor(),
        threads=torch.get_num_threads(),
        variant=_C.active_cpu_variant(),
        models=models,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", help="folders like examples/demo_model")
    parser.add_argument("--only", choices=("experts", "channels"))
    parser.add_argument("--without", nargs="*", default=[], help="methods to leave out, such as slow searches")
    parser.add_argument("--without-outside", nargs="*", help="the same out of domain, where that differs")
    parser.add_argument("--seconds", action="store_true", help="add times to the output file; judge nothing")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.seconds and arguments.output is None:
        parser.error("--seconds adds to --output")
    root = Path(__file__).parent.parent / "examples"
    result: dict[str, Any] = {}
    if arguments.output is not None and arguments.output.exists():
        result = json.loads(arguments.output.read_text(encoding="utf-8"))["models"]
    for folder in arguments.models or [root / name for name in MODELS]:
        with tempfile.TemporaryDirectory() as scratch:
            judge = Judge(folder, Path(scratch))
            if arguments.seconds:
                took = seconds(judge, arguments.only, arguments.without)
                for row in result[folder.name]["rows"]:
                    row["seconds"] = took.get(f"{row['size']} {row['method']}")
                write(arguments.output, result)
                continue
            case = Case(judge.model, judge.batches(judge.seen))
            rows: list[dict[str, Any]] = []
            for way in ways(arguments.only, arguments.without):
                rows.append(judge.row(case, *way))
                print(rows[-1], flush=True)
            outside = []
            for row in out_of_domain(judge, arguments.only, arguments.without_outside or arguments.without):
                outside.append(row)
                print(row, flush=True)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in case.batches)
        result[folder.name] = {
            "unpruned": judge.unpruned.mean,
            "parameters": judge.model.num_parameters(),
            "calibration tokens": tokens,
            "rows": rows,
            "out of domain": outside,
        }
        print(f"\n{folder.name}: unpruned {judge.unpruned.mean:.2f}\n\n{table(rows)}\n\n{table(outside)}\n")
        if arguments.output is not None:
            write(arguments.output, result)


if __name__ == "__main__":
    main()
