"""Models inside of others: compiled, data-parallel, with adapters."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext import ops
from tests.support.batches import padded_batches, random_tokens
from tests.support.mixtral import MixtralFactory, plan_of


class PeftModel(nn.Module):
    """What peft's class of that name is like, as far as it matters: it is no transformers model, and holds one."""

    def __init__(self, model: nn.Module, *, prompts: bool = False) -> None:
        super().__init__()
        self.base_model = SimpleNamespace(model=model)
        self.active_peft_config = SimpleNamespace(is_prompt_learning=prompts)

    def get_base_model(self) -> Any:
        return self.base_model.model


class PeftModelForCausalLM(PeftModel):
    pass


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "adapters": PeftModelForCausalLM,
    "compiled adapters": lambda model: compiled(PeftModelForCausalLM(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_wrapped_model_is_read_and_patched_as_the_model_inside(tiny_mixtral: MixtralFactory, wrap: Any) -> None:
    model = tiny_mixtral()
    wrapped, batches = wrap(model), padded_batches()
    expected = moe_ext.calibrate(model, batches, progress=False)
    got = moe_ext.calibrate(wrapped, batches, progress=False)
    assert all(torch.equal(tensor, got.tensors()[name]) for name, tensor in expected.tensors().items())
    assert moe_ext.search(wrapped, batches, keep=7, progress=False).plan == (
        moe_ext.search(model, batches, keep=7, progress=False).plan
    )
    assert torch.equal(moe_ext.aimer(wrapped).values, moe_ext.aimer(model).values)
    assert moe_ext.patch(wrapped, skip=torch.full((3, 1), 0.5)) is wrapped
    with moe_ext.count_skips(wrapped) as count, torch.no_grad():
        model(random_tokens(1, 5))
    assert count.slots == [10, 10, 10]
    assert moe_ext.unpatch(wrapped) is wrapped
    assert not hasattr(model.config, "moe_ext")


def test_a_compiled_model_that_ran_is_patched(tiny_mixtral: MixtralFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, route = compiled(tiny_mixtral(num_hidden_layers=1)), [], ops.route

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return route(*arguments)

    monkeypatch.setattr(ops, "route", counted)
    with torch.no_grad():
        before = model(random_tokens(1, 5)).logits
        moe_ext.patch(model, skip=torch.full((1, 1), 1.0))
        skipping = model(random_tokens(1, 5)).logits
        moe_ext.unpatch(model)
        after = model(random_tokens(1, 5)).logits
    assert calls
    assert not torch.allclose(before, skipping)
    assert torch.equal(before, after)


def test_pruning_says_what_to_do_about_wrappers_that_keep_account_of_weights(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    with pytest.raises(
        ValueError, match=r"PeftModelForCausalLM: adapters .*; prune model.merge_and_unload\(\) instead"
    ):
        moe_ext.prune(PeftModelForCausalLM(model), plan_of())
    with pytest.raises(ValueError, match=r"DataParallel keeps account .*; prune model.module and wrap it anew"):
        moe_ext.prune(nn.DataParallel(model), plan_of())
    assert model.model.layers[0].mlp.experts.num_experts == 8
    wrapped = compiled(model)
    assert moe_ext.prune(wrapped, plan_of()) is wrapped
    assert model.model.layers[0].mlp.experts.num_experts == 5


def test_learned_prompts_are_refused(tiny_mixtral: MixtralFactory) -> None:
    with pytest.raises(ValueError, match="PeftModelForCausalLM has learned prompts"):
        moe_ext.calibrate(PeftModelForCausalLM(tiny_mixtral(), prompts=True), [], progress=False)


def test_the_perplexity_of_a_wrapped_model_is_that_of_the_model(tiny_mixtral: MixtralFactory) -> None:
    class Letters:
        def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) % 96 for letter in text]}

    model: Any = tiny_mixtral()
    expected = moe_ext.perplexity(model, {"d": "some text"}, Letters(), window=4)
    for wrap in (nn.DataParallel, PeftModelForCausalLM):
        assert moe_ext.perplexity(wrap(model), {"d": "some text"}, Letters(), window=4) == expected
