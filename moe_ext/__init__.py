"""moe_ext makes sparse Mixture-of-Experts language models smaller and faster after training.

stats = moe_ext.calibrate(model, batches)
plan = moe_ext.plan(moe_ext.score(stats, "man"), keep=6)
moe_ext.prune(model, plan)  # or moe_ext.search(model, batches, keep=6).plan
moe_ext.patch(model, skip=moe_ext.skip_thresholds(stats))
"""

import moe_ext.binary  # noqa: F401  first: one clear ImportError if torch or the binary does not fit
from moe_ext import data
from moe_ext.calibration.calibrate import calibrate
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import from_pretrained
from moe_ext.compression.compress import compress
from moe_ext.compression.result import Compressed
from moe_ext.decision.criteria import CRITERIA, OBJECTIVES, Scores, score
from moe_ext.decision.plan import plan
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.decision.redundancy import ExpertPair, redundant_pairs
from moe_ext.decision.super_experts import SuperExpert, super_experts
from moe_ext.decision.thin_plan import thin_plan
from moe_ext.decision.thresholds import skip_thresholds
from moe_ext.decision.weights_only import aimer
from moe_ext.evaluation.divergence import Divergence, divergence
from moe_ext.evaluation.perplexity import Perplexity, perplexity
from moe_ext.evaluation.predictions import save_predictions
from moe_ext.pruning.prune import prune
from moe_ext.pruning.prune_folder import PrunedCheckpoint, prune_checkpoint
from moe_ext.pruning.prune_gguf import prune_gguf
from moe_ext.quantisation.folder import QuantisedCheckpoint, quantize_checkpoint
from moe_ext.quantisation.in_memory import quantize
from moe_ext.reconstruction.result import LayerLosses, SearchResult
from moe_ext.reconstruction.search import search
from moe_ext.runtime.compiled_decoding import compile_decoding
from moe_ext.runtime.memory_nodes import Placement, place_on_nodes
from moe_ext.runtime.patching import patch, unpatch
from moe_ext.runtime.skipping import count_skips
from moe_ext.version import __version__

__all__ = [
    "CRITERIA",
    "OBJECTIVES",
    "Compressed",
    "Divergence",
    "ExpertPair",
    "ExpertStatistics",
    "LayerLosses",
    "Perplexity",
    "Placement",
    "PrunedCheckpoint",
    "PruningPlan",
    "QuantisedCheckpoint",
    "Scores",
    "SearchResult",
    "SuperExpert",
    "__version__",
    "aimer",
    "calibrate",
    "compile_decoding",
    "compress",
    "count_skips",
    "data",
    "divergence",
    "from_pretrained",
    "patch",
    "perplexity",
    "place_on_nodes",
    "plan",
    "prune",
    "prune_checkpoint",
    "prune_gguf",
    "quantize",
    "quantize_checkpoint",
    "redundant_pairs",
    "save_predictions",
    "score",
    "search",
    "skip_thresholds",
    "super_experts",
    "thin_plan",
    "unpatch",
]
