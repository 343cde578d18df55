"""Before several processes begin: do all of them do the same job? Sums over different text, options or models would
add up to something that nobody asked for, without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.models.blocks import model_type_of
from moe_ext.storage.digests import sampled_digest, text_digest
from moe_ext.version import __version__

# Fields of a config that may differ between machines, or are compared by themselves.
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "dtype")


def check_same_job(
    batches: Sequence[Mapping[str, Tensor]],
    model: PreTrainedModel,
    on_disk: LayersOnDisk | None,
    options: Mapping[str, object],
) -> None:
    """Checks that every process was given the same text, model and options, before work begins.

    Args:
        batches: all of them, not this process's share.
        on_disk: where the model's weights are, if they are not in it.
        options: by name, as JSON takes them.

    Raises:
        ValueError: in every process, naming the ranks and in what they differ from the first.
        RuntimeError: a process is gone, or does not answer in time.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    facts = {
        "text as cut into batches": text_digest(batches),
        **{name: json.dumps(value) for name, value in options.items()},
        "model type": model_type_of(model),
        "dtype": str(model.dtype),
        "config": json.dumps(config, sort_keys=True, default=str),
        "place of the model (in memory or in a folder)": str(on_disk is None),
        "weights": sampled_digest(model.state_dict().items()) if on_disk is None else on_disk.sampled_digest(),
        "versions": f"{__version__} {torch.__version__} {transformers.__version__}",
    }
    everywhere: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, facts)
    differing = [
        f"rank {rank} differs from rank 0 in {', '.join(names)}"
        for rank, others in enumerate(everywhere)
        if (names := [name for name in everywhere[0] if others.get(name) != everywhere[0][name]])
    ]
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(f"the processes do not do the same job: {'; '.join(differing[:3])}{more}")
