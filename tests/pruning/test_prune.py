"""prune against a stock model whose router is masked, and reload in a process without moe_ext."""

import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moe_ext
from moe_ext.decision.pruning_plan import PruningPlan
from tests.support.batches import random_tokens
from tests.support.families import mask_routers
from tests.support.mixtral import KEEP, MixtralFactory, plan_of
from tests.support.reference import DEVICES


@pytest.mark.parametrize("device", DEVICES)
def test_a_pruned_model_equals_the_stock_model_with_a_masked_router(tiny_mixtral: MixtralFactory, device: str) -> None:
    pruned, masked = moe_ext.prune(tiny_mixtral().to(device), plan_of()), tiny_mixtral().to(device)
    mask_routers(masked, KEEP)
    tokens = random_tokens(3, 17).to(device)
    with torch.no_grad():
        torch.testing.assert_close(pruned(tokens).logits, masked(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_patched_model_can_be_pruned(tiny_mixtral: MixtralFactory, device: str) -> None:
    tokens = random_tokens(2, 9).to(device)
    thresholds = torch.full((3, 1), 0.5)
    patched_first = moe_ext.prune(moe_ext.patch(tiny_mixtral().to(device), skip=thresholds), plan_of())
    pruned_first = moe_ext.patch(moe_ext.prune(tiny_mixtral().to(device), plan_of()), skip=thresholds)
    with torch.no_grad():
        assert torch.equal(patched_first(tokens).logits, pruned_first(tokens).logits)


@pytest.mark.parametrize("device", DEVICES)
def test_pruning_updates_every_count(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = moe_ext.prune(tiny_mixtral().to(device), plan_of())
    assert model.config.num_local_experts == 5
    assert model.config.num_experts == 5
    assert model.num_experts == 5
    for layer in model.model.layers:
        assert layer.mlp.gate.num_experts == layer.mlp.experts.num_experts == 5
        assert layer.mlp.gate.weight.shape == (5, 32)
        assert layer.mlp.experts.gate_up_proj.shape == (5, 80, 32)
        assert layer.mlp.experts.down_proj.shape == (5, 32, 40)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    tokens = random_tokens(1, 6).to(device)
    model(tokens, labels=tokens, output_router_logits=True).loss.backward()  # the auxiliary loss counts experts, too


def test_pruning_a_pruned_model_again(tiny_mixtral: MixtralFactory) -> None:
    once = moe_ext.prune(tiny_mixtral(), plan_of(((0, 3, 7), (2, 4, 6), (0, 1, 6))))
    twice = moe_ext.prune(tiny_mixtral(), plan_of())
    moe_ext.prune(twice, plan_of(((0, 2, 4), (1, 2, 4), (0, 1, 3)), num_experts=5))
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        assert torch.equal(once(tokens).logits, twice(tokens).logits)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_transformers_loads_a_pruned_checkpoint_without_moe_ext(
    tiny_mixtral: MixtralFactory, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = moe_ext.prune(moe_ext.patch(tiny_mixtral(dtype=dtype), skip=torch.full((3, 1), 0.5)), plan_of())
    model.save_pretrained(tmp_path / "pruned")
    tokens = random_tokens(2, 11)
    with torch.no_grad():
        expected = moe_ext.unpatch(model)(tokens).logits
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    code = f"""
import sys
sys.modules["moe_ext"] = None  # any import of it fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(r"{tmp_path / "pruned"}", dtype="auto")
with torch.no_grad():
    logits = model(load_file(r"{tmp_path / "tokens.safetensors"}")["tokens"]).logits
save_file({{"logits": logits.contiguous()}}, r"{tmp_path / "logits.safetensors"}")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


@pytest.mark.slow
def test_at_most_one_layers_experts_are_held_twice(
    tiny_mixtral: MixtralFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_mixtral()
    old = [[weakref.ref(parameter) for parameter in layer.mlp.experts.parameters()] for layer in model.model.layers]
    held_twice: list[int] = []
    select = Tensor.index_select

    def watched(self: Tensor, *args: Any) -> Tensor:
        rows = select(self, *args)
        gc.collect()
        compacted = [layer.mlp.experts.down_proj.shape[0] == 5 for layer in model.model.layers]
        alive = [any(reference() is not None for reference in references) for references in old]
        held_twice.append(sum(done and left for done, left in zip(compacted, alive, strict=True)))
        return rows

    monkeypatch.setattr(Tensor, "index_select", watched)
    moe_ext.prune(model, plan_of())
    assert len(held_twice) == 9
    assert max(held_twice) == 0  # a compacted layer's old experts are gone before the next layer is touched


def test_frozen_weights_stay_frozen(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral().requires_grad_(False)
    moe_ext.prune(model, plan_of())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_experts_with_further_weights_are_refused_whole(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    model.model.layers[2].mlp.experts.scale = nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match="expected plain"):
        moe_ext.prune(model, plan_of())
    assert [layer.mlp.gate.weight.shape[0] for layer in model.model.layers] == [8, 8, 8]


def test_a_layer_is_never_half_pruned(tiny_mixtral: MixtralFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mixtral()
    select, calls = Tensor.index_select, 0

    def out_of_memory(self: Tensor, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise MemoryError
        return select(self, *args)

    monkeypatch.setattr(Tensor, "index_select", out_of_memory)
    with pytest.raises(MemoryError):
        moe_ext.prune(model, plan_of())
    for layer, count in zip(model.model.layers, (5, 8, 8), strict=True):
        assert {parameter.shape[0] for parameter in layer.mlp.parameters()} == {count}
        assert layer.mlp.gate.num_experts == layer.mlp.experts.num_experts == count


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(model_type="qwen3_moe"), "the plan is for model type 'qwen3_moe'; this model is 'mixtral'"),
        (
            plan_of(layers=("a", "b", "c")),
            "the plan has 3 layers from 'a'; this model has 3 MoE layers from 'model",
        ),
        (plan_of(KEEP[:2]), "the plan has 2 layers from 'model.layers.0.mlp'; this model has 3 MoE layers"),
        (plan_of(num_experts=16), "the plan is for 16 experts a layer; model.layers.0.mlp has 8"),
        (plan_of(((0,), (1,), (2,)), top_k=1), "the plan is for top_k 1; this model has 2"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(
    tiny_mixtral: MixtralFactory, plan: PruningPlan, message: str
) -> None:
    model = tiny_mixtral()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        moe_ext.prune(model, plan)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert model.config.num_local_experts == 8


def test_uneven_layers_without_a_number_are_refused(
    tiny_mixtral: MixtralFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_mixtral()
    monkeypatch.setattr("moe_ext.models.blocks._DECODER_LAYER", re.compile("never"))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp is in no numbered decoder layer"):
        moe_ext.prune(model, plan_of(((0, 1), (0, 1, 2), (0, 1))))
    assert [layer.mlp.gate.weight.shape[0] for layer in model.model.layers] == [8, 8, 8]
