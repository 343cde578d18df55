"""A family whose experts lie in flat matrices, counted by a config within its config: pruned, refused anything else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DbrxConfig, DbrxForCausalLM, PreTrainedModel

import moe_ext
from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import counted_of, counting_attributes, prunable_blocks
from moe_ext.models.counted import Dimension
from tests.support.families import mask_routers, reloaded

TOKENS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
LAYERS = ("transformer.blocks.0.ffn", "transformer.blocks.1.ffn")
KEEP = ((0, 2, 3, 5, 7), (1, 2, 4, 6, 7))


def build(**changes: Any) -> PreTrainedModel:
    """Eight experts of eight channels; as many heads."""
    ffn = {"ffn_hidden_size": 8, "moe_num_experts": 8, "moe_top_k": 2, **changes}
    attention = {"kv_n_heads": 8, "rope_theta": 1e4, "clip_qkv": 8.0}
    sizes = {"d_model": 32, "n_heads": 8, "n_layers": 2, "max_seq_len": 64, "vocab_size": 64, "pad_token_id": 0}
    model = DbrxForCausalLM(DbrxConfig(**sizes, attn_config=attention, ffn_config=ffn)).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        if tensor.dim() > 1:
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def plan_of(keep: tuple[tuple[int, ...], ...] = KEEP, channels: KeptChannels | None = None) -> PruningPlan:
    return PruningPlan("dbrx", 8, 2, LAYERS, keep, channels=channels)


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


def test_what_counts_its_experts_is_measured() -> None:
    found = counted_of(model := build())
    assert found.fields == ("ffn_config.moe_num_experts",)
    experts = {f"{layer}.experts.mlp.{name}": Dimension(0, 8) for layer in LAYERS for name in ("w1", "v1", "w2")}
    assert found.tensors == {**experts, **{f"{layer}.router.layer.weight": Dimension(0) for layer in LAYERS}}
    named = [(type(each.module).__name__, each.name) for each in counting_attributes(model, [5, 5]) if each.value == 5]
    layer = [("Linear", "out_features"), ("DbrxExperts", "num_experts"), ("DbrxExpertGLU", "moe_num_experts")]
    assert named == [("DbrxForCausalLM", "num_experts"), *layer, *layer]


@pytest.mark.parametrize("norm", [1.0, None])
def test_pruned_it_is_the_masked_model_in_memory_from_disk_and_loaded_by_stock(
    norm: float | None, tmp_path: Path
) -> None:
    model, whole = build(moe_normalize_expert_weights=norm), build(moe_normalize_expert_weights=norm)
    whole.save_pretrained(tmp_path / "whole")
    unpruned = logits_of(whole)
    mask_routers(whole, KEEP)
    expected = logits_of(whole)
    largest = float(expected.abs().max())
    assert float((expected - unpruned).abs().max()) > 0.1 * largest
    moe_ext.prune(model, plan_of())
    pruned = logits_of(model)
    torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-5 * largest)
    written = moe_ext.prune_checkpoint(tmp_path / "whole", plan_of(), tmp_path / "pruned", progress=False)
    again = reloaded(DbrxForCausalLM.from_pretrained, tmp_path / "pruned").eval()
    held = model.state_dict()
    assert again.state_dict().keys() == held.keys()
    assert all(torch.equal(tensor, held[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(logits_of(again), pruned)
    assert written.weight_bytes == sum(tensor.nbytes for tensor in held.values())
    contents = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "pruned")]
    contents[0]["ffn_config"]["moe_num_experts"] = 5
    assert contents[0] == contents[1]
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(reloaded(DbrxForCausalLM.from_pretrained, tmp_path / "saved").eval()), pruned)


def test_a_plan_is_made_from_its_weights() -> None:
    model = build()
    mlp: Any = prunable_blocks(model)[1].experts.get_submodule("mlp")
    mlp.w1.data[8 * 3 : 8 * 4] = 0.3  # of expert 3: further from Gaussian, and less
    scores = moe_ext.aimer(model)
    weights = torch.cat([each.detach().view(8, -1) for each in (mlp.w1, mlp.v1, mlp.w2)], dim=1).double()
    torch.testing.assert_close(scores.values[1], weights.square().mean(1).sqrt() / weights.abs().mean(1))
    plan = moe_ext.plan(scores, keep=7)
    assert 3 not in plan.keep[1]
    moe_ext.prune(model, plan)
    assert model.config.ffn_config.moe_num_experts == 7
    assert not any((block == 0.3).all() for block in mlp.w1.view(7, 8, 32))


def test_what_does_not_go_is_refused_with_the_reason_and_what_does(tmp_path: Path) -> None:
    model, folder, out = build(), tmp_path / "whole", tmp_path / "pruned"
    model.save_pretrained(folder)
    before, batches = logits_of(model), [{"input_ids": TOKENS}]
    thin = plan_of(channels=KeptChannels(8, ((b"\x7f",) * 5,) * 2))
    jobs: list[Callable[[], object]] = [
        lambda: moe_ext.patch(model),
        lambda: moe_ext.calibrate(model, batches, progress=False),
        lambda: moe_ext.search(model, batches, keep=2, progress=False),
        lambda: moe_ext.prune(model, plan_of(), refit=batches),
        lambda: moe_ext.prune(model, thin),
        lambda: moe_ext.calibrate(folder, batches, progress=False),
        lambda: moe_ext.search(folder, batches, keep=2, progress=False),
        lambda: moe_ext.prune_checkpoint(folder, plan_of(), out, refit=batches, progress=False),
        lambda: moe_ext.prune_checkpoint(folder, thin, out, progress=False),
    ]
    for job in jobs:
        with pytest.raises(ValueError, match=r"flat matrices.* Whole experts can go.* moe_ext\.aimer's scores"):
            job()
    uneven = plan_of((KEEP[0], KEEP[1][:4]))
    for job in (
        lambda: moe_ext.prune(model, uneven),
        lambda: moe_ext.prune_checkpoint(folder, uneven, out, progress=False),
    ):
        with pytest.raises(ValueError, match=r"keeps 4 to 5 experts a layer; 'dbrx' models .* one number"):
            job()
    mlp: Any = prunable_blocks(model)[1].experts.get_submodule("mlp")
    whole, mlp.w2 = mlp.w2, torch.nn.Parameter(mlp.w2[:56].clone())
    with pytest.raises(ValueError, match=r"transformer\.blocks\.1\.ffn: the experts' w2 has shape .* 8 experts along"):
        moe_ext.prune(model, plan_of())
    mlp.w2 = whole
    assert torch.equal(logits_of(model), before)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
