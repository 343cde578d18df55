"""Families whose stacked experts are called past transformers' experts interface."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import moe_ext
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.decision.checkpoint_size import checkpoint_size
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.layout import layout_of
from moe_ext.models.router_formula import shown_router
from tests.support import direct_families
from tests.support.families import channels_for, mask_routers, reloaded

NAMES = direct_families.NAMES
WITHOUT_SUMS = {"llama4": "given the hidden states times the router's weights", "longcat_flash": "to pass a token on"}


def given() -> dict[str, Tensor]:
    """Text, three tokens of it padding."""
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[-1, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**given()).logits
    return logits


def plan_of(model: PreTrainedModel, fewer: int = 0) -> PruningPlan:
    """Keeps five experts, in every second layer as many less."""
    blocks = moe_blocks(model)
    layout = layout_of(model, blocks)
    keep = tuple((0, 2, 3, 5, 7)[: 5 - (fewer if layer % 2 else 0)] for layer in range(len(blocks)))
    return PruningPlan(layout.model_type, layout.num_experts, layout.top_k, layout.layers, keep)


def statistics(model: PreTrainedModel | Path) -> ExpertStatistics:
    return moe_ext.calibrate(model, [given()], progress=False, outputs=True)


@pytest.mark.parametrize("name", NAMES)
def test_patched_it_says_the_same_and_unpatched_it_is_what_it_was(name: str) -> None:
    model = direct_families.build(name)
    expected = logits_of(model)
    tokens = given()["input_ids"][:1]
    said = model.generate(tokens, max_new_tokens=3, do_sample=False)
    moe_ext.patch(model)
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=32 * 2.0**-22 * float(expected.abs().max()))
    assert torch.equal(model.generate(tokens, max_new_tokens=3, do_sample=False), said)
    moe_ext.unpatch(model)
    assert torch.equal(logits_of(model), expected)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_patched_it_trains_as_before(name: str) -> None:
    model = direct_families.build(name)
    gradients = []
    for patched in (False, True):
        if patched:
            moe_ext.patch(model)
        model.zero_grad()
        model(**given(), labels=given()["input_ids"]).loss.backward()
        gradients.append({key: each.grad for key, each in model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def routed(name: str, block: torch.nn.Module, x: Tensor) -> list[tuple[int, int, float, Tensor]]:
    """(token, expert, weight, output) of every slot of a block's experts, by what the family's paper or code defines;
    float64."""
    tensors = {key: tensor.double() for key, tensor in block.state_dict().items()}
    x, found = x.double(), []
    gate_up, down = tensors["experts.gate_up_proj"], tensors["experts.down_proj"]
    router = next(
        tensors[key] for key in ("router.weight", "gate.weight", "router.classifier.weight") if key in tensors
    )
    logits = x @ router.T
    for token, row in enumerate(logits):
        if name == "longcat_flash":
            scores = row.softmax(-1)
            chosen = (scores + tensors["router.e_score_correction_bias"]).topk(3).indices.tolist()
            weights = (scores * 6.0).tolist()
        elif name == "step3p7":
            scores = row.sigmoid()
            chosen = (scores + tensors["gate.e_score_correction_bias"]).topk(2).indices.tolist()
            weights = (scores / scores[chosen].sum()).tolist()
        else:
            chosen, weights = [int(row.argmax())], [1.0] * len(row)
        for expert in chosen:
            if expert >= len(down):
                continue
            if name == "llama4":
                gate, up = (x[token] * row[expert].sigmoid() @ gate_up[expert]).chunk(2)
                output = F.silu(gate) * up @ down[expert]
            else:
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                limit = getattr(block.experts, "limit", torch.inf)
                output = down[expert] @ (F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit))
            found.append((token, expert, weights[expert], output))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_definition(name: str) -> None:
    model = direct_families.build(name)
    got = statistics(model)
    blocks = moe_blocks(model)
    seen: list[Tensor] = []
    handles = [
        block.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
        for block in blocks
    ]
    logits_of(model)
    for handle in handles:
        handle.remove()
    counted = given()["attention_mask"].flatten().bool()
    assert got.output_sum is not None
    for layer, block in enumerate(blocks):
        moments, sums = torch.zeros(8, 3, 3).double(), torch.zeros(8, 32).double()
        for _, expert, weight, output in routed(name, block.module, seen[layer][counted]):
            powers = torch.tensor([1.0, weight, weight**2]).double()
            norm = output.norm()
            moments[expert] += powers[:, None] * torch.stack([norm**0, norm, norm**2])
            sums[expert] += output
        for value, expected in ((got.moments[layer], moments), (got.output_sum[layer], sums)):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(got.tokens, torch.full((len(blocks),), int(counted.sum())))


@pytest.mark.parametrize("name", NAMES)
def test_pruned_it_is_the_masked_model_in_memory_from_disk_and_loaded_by_stock(name: str, tmp_path: Path) -> None:
    model, whole = direct_families.build(name), direct_families.build(name)
    whole.save_pretrained(tmp_path / "whole")
    assert torch.equal(statistics(tmp_path / "whole").moments, statistics(model).moments)
    plan = plan_of(model)
    moe_ext.prune(model, plan)
    pruned = logits_of(model)
    mask_routers(whole, plan.keep)
    expected = logits_of(whole)
    torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    written = moe_ext.prune_checkpoint(tmp_path / "whole", plan, tmp_path / "pruned", progress=False)
    again = reloaded(type(model).from_pretrained, tmp_path / "pruned").eval()
    found, held = again.state_dict(), model.state_dict()
    assert found.keys() == held.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in held.items())
    assert torch.equal(logits_of(again), pruned)
    size = checkpoint_size(tmp_path / "whole", plan.keep)
    assert size.fixed + size.width * size.per_channel == written.weight_bytes


@pytest.mark.parametrize("name", NAMES)
def test_layers_may_keep_different_numbers(name: str, tmp_path: Path) -> None:
    model = direct_families.build(name)
    moe_ext.prune(model, plan_of(model, fewer=1))
    assert {block.num_experts for block in moe_blocks(model)} == {5, 4}
    model.save_pretrained(tmp_path)
    again = reloaded(moe_ext.from_pretrained, tmp_path).eval()
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("name", NAMES)
def test_a_search_goes_or_is_refused_before_any_work(name: str) -> None:
    model = direct_families.build(name)
    if name == "step3p7":
        for loss in ("reconstruction", "fisher"):
            found = moe_ext.search(model, [given()], keep=6, loss=loss, progress=False)
            assert sum(map(len, found.plan.keep)) == 18
        return
    with pytest.raises(ValueError, match=rf"search: .*{WITHOUT_SUMS[name]}.* this family by statistics"):
        moe_ext.search(model, [], keep=6, progress=False)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_go_with_such_experts_is_refused_with_the_reason(name: str) -> None:
    model = direct_families.build(name)
    stats = statistics(model)
    with pytest.raises(ValueError, match=r"novices: .*Experts are called past transformers' experts interface"):
        moe_ext.prune(model, plan_of(model), novices=stats)
    if name == "longcat_flash":
        with pytest.raises(ValueError, match=r"skip: .* has 3 choices beside its experts that compute nothing"):
            moe_ext.patch(model, skip=moe_ext.skip_thresholds(stats))
        whole = plan_of(model)
        thin = PruningPlan(
            *(whole.model_type, 8, 3, whole.layers, (tuple(range(8)),) * 2), channels=channels_for(model, 16)
        )
        with pytest.raises(ValueError, match=r"channels: .* rows for choices that return a token as it is"):
            moe_ext.prune(model, thin)
    assert all(block.num_experts == 8 for block in moe_blocks(model))


def test_patched_it_is_traced_whole_and_goes_through_pickle() -> None:
    model = moe_ext.patch(direct_families.build("longcat_flash"))
    expected = logits_of(model)
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(model))), expected)
    block, x = moe_blocks(model)[0].module, torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(x), block(x))


def test_its_routers_are_told_by_numbers() -> None:
    shown = {name: shown_router(moe_blocks(direct_families.build(name))[0]) for name in NAMES}
    assert shown["llama4"] == "the route operator: sigmoid scores"
    assert shown["step3p7"] == "the route operator: sigmoid scores, a correction bias, renormalised"
    assert shown["longcat_flash"] == "the route operator: softmax scores, a correction bias, scaled by 6"


def test_of_a_model_with_images_the_part_for_text_is_calibrated_and_pruned(tmp_path: Path) -> None:
    model, text = direct_families.build("llama4_images"), direct_families.build("llama4")
    model.language_model.load_state_dict(text.state_dict())
    model.save_pretrained(tmp_path / "whole")
    expected = statistics(text).moments
    assert torch.equal(statistics(model).moments, expected)
    assert torch.equal(statistics(tmp_path / "whole").moments, expected)
    with pytest.raises(ValueError, match="Llama4TextModel takes no 'pixel_values'"):
        moe_ext.calibrate(model, [{**given(), "pixel_values": torch.zeros(1, 3, 28, 28)}], progress=False)
    plan = plan_of(model)
    moe_ext.prune_checkpoint(tmp_path / "whole", plan, tmp_path / "pruned", progress=False)
    moe_ext.prune(model, plan)
    found = reloaded(type(model).from_pretrained, tmp_path / "pruned").state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())
    assert model.config.text_config.num_local_experts == 5


def test_inputs_that_differ_between_a_tokens_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k is 2; .* supported for one expert a token"):
        moe_blocks(direct_families.build("llama4", num_experts_per_tok=2))
