"""Models in memory whose experts transformers holds quantised: refused by name, and left as they are."""

import pytest
import torch
from torch import nn
from transformers import FineGrainedFP8Config, PreTrainedModel
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import moe_ext
from tests.support.families import build, keep_of, plan_for


def with_float8(model: PreTrainedModel) -> PreTrainedModel:
    """As transformers loads it on a GPU: the modules of its own, here with numbers of ours in them."""
    settings = FineGrainedFP8Config(weight_block_size=(8, 8))
    replace_with_fp8_linear(model, ["lm_head", "gate"], settings)
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            if tensor.is_meta:
                filled = nn.Parameter(torch.zeros(tensor.shape).to(tensor.dtype), requires_grad=False)
                setattr(module, name, filled)
    return model


def with_mxfp4(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(model.config)
    return model


CASES = {
    "mixtral": (with_float8, r"model\.layers\.0\.mlp: FP8Experts holds float8 .* give the checkpoint folder instead"),
    "gpt_oss": (
        with_mxfp4,
        r"model\.layers\.0\.mlp: Mxfp4GptOssExperts holds MXFP4 .* give the checkpoint folder",
    ),
}


@pytest.mark.parametrize("family", CASES)
def test_quantised_experts_in_memory_are_refused_by_name_and_stay(family: str) -> None:
    quantised, message = CASES[family]
    plain = build(family)
    plan = plan_for(plain, keep_of(plain, family))
    model = quantised(plain)
    before = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
    batches = [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}]
    with pytest.raises(ValueError, match=message):
        moe_ext.prune(model, plan)
    with pytest.raises(ValueError, match=message):
        moe_ext.patch(model)
    with pytest.raises(ValueError, match=message):  # another experts implementation would not run them either
        moe_ext.patch(model, strict=False)
    with pytest.raises(ValueError, match=message):
        moe_ext.calibrate(model, batches, progress=False)
    with pytest.raises(ValueError, match=message):
        moe_ext.search(model, batches, keep=4, progress=False)
    with pytest.raises(ValueError, match=message):
        moe_ext.aimer(model)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()} == before
