"""moe_ext makes sparse Mixture-of-Experts language models smaller and faster after training.

stats = moe_ext.calibrate(model, batches)
plan = moe_ext.plan(moe_ext.score(stats, "man"), keep=6)
moe_ext.prune(model, plan)  # or moe_ext.search(model, batches, keep=6).plan
moe_ext.patch(model, skip=moe_ext.skip_thresholds(stats))
"""

import moe_ext.binary  # noqa: F401  first: one clear ImportError if torch or the binary does not fit
from moe_ext.calibration import calibrate
from moe_ext.checkpoint import from_pretrained
from moe_ext.checkpoint_pruning import PrunedCheckpoint, prune_checkpoint
from moe_ext.criteria import CRITERIA, OBJECTIVES, Scores, aimer, score
from moe_ext.evaluation import Perplexity, perplexity
from moe_ext.patching import patch, unpatch
from moe_ext.plan import PruningPlan, plan
from moe_ext.pruning import prune
from moe_ext.redundancy import ExpertPair, redundant_pairs
from moe_ext.routing import count_skips, skip_thresholds
from moe_ext.search import search
from moe_ext.search_result import LayerLosses, SearchResult
from moe_ext.statistics import ExpertStatistics
from moe_ext.version import __version__

__all__ = [
    "CRITERIA",
    "OBJECTIVES",
    "ExpertPair",
    "ExpertStatistics",
    "LayerLosses",
    "Perplexity",
    "PrunedCheckpoint",
    "PruningPlan",
    "Scores",
    "SearchResult",
    "__version__",
    "aimer",
    "calibrate",
    "count_skips",
    "from_pretrained",
    "patch",
    "perplexity",
    "plan",
    "prune",
    "prune_checkpoint",
    "redundant_pairs",
    "score",
    "search",
    "skip_thresholds",
    "unpatch",
]
