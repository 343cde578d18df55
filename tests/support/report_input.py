"""Statistics, a search and variants for the tests of the report: those of the demo model on a little text."""

from functools import cache

import torch

import moe_ext
from moe_ext import ExpertStatistics, SearchResult
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.evaluation.results import Variant
from moe_ext.report.sections import Report
from moe_ext.runtime.batches import read_domains, token_batches
from tests.support.paths import DEMO_MODEL

VARIANTS = (
    Variant("unpruned", 18.84, 9_900_000, 100.0),
    Variant('<pruned> & "small"', 25.85, 7_800_000, 120.0),
    Variant("worse", 40.24, 7_800_000, None),
)


@cache
def demo_report() -> Report:
    """A report with all that it can show."""
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    texts = {domain: text[:1500] for domain, text in read_domains([DEMO_MODEL / "calibration"]).items()}
    batches = list(token_batches(texts, tokenizer, window=128))
    stats: ExpertStatistics = moe_ext.calibrate(
        model, batches, progress=False, dataset="a </script> b", outputs=True, channels="energy"
    )
    search: SearchResult = moe_ext.search(model, batches, keep=6, progress=False)
    return Report(stats, search=search, variants=VARIANTS)


def thin_report() -> Report:
    """A report of the least there can be: one expert a token, no search, no variants."""
    stats = ExpertStatistics.zeros("mixtral", ("layers.0",), 3, 1, "softmax")
    stats.tokens += 4
    stats.moments[0, :, 0, 0] = torch.tensor([3.0, 1.0, 0.0])
    return Report(stats)
