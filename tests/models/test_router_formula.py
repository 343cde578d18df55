"""Routers recognised by what their own code computes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_ext
from moe_ext import ops
from moe_ext.models.blocks import MoeBlock, moe_blocks
from moe_ext.models.router_formula import RouterFormula, known_router
from tests.support import every_family, families

# One family of every kind of router code that there is.
KINDS = ("afmoe", "aria", "axk2", "beam", "cohere2_moe", "deepseek_v4", "ernie4_5_vl_moe", "flint", "gpt_oss",
         "granitemoe", "hunyuan_v1_moe", "hy_v3", "inkling2", "jamba", "kolibri1", "laguna", "lfm2_moe",
         "minimax_m3_vl", "mistral4", "muse_spark", "openai_privacy_filter", "qwen3_next")  # fmt: skip

# Sparsemixer; a softmax over chosen and shared experts; a network of three layers with the state of the layer before.
OF_NO_FORMULA = ("inkling", "phimoe", "zaya")


def blocks_of(name: str) -> list[MoeBlock]:
    """The MoE layers of a family's tiny model without weights."""
    _, model_class = every_family._classes(name)
    with torch.device("meta"):
        model = model_class(every_family.config(name))
    return moe_blocks(model)


@pytest.mark.parametrize("name", [*KINDS, *OF_NO_FORMULA])
def test_every_kind_of_router_but_three_is_understood(name: str) -> None:
    assert (known_router(blocks_of(name)[-1]) is None) == (name in OF_NO_FORMULA)


@pytest.mark.parametrize(
    ("name", "changes", "formula"),
    [
        ("mixtral", {}, RouterFormula()),
        ("olmoe", {"norm_topk_prob": False}, RouterFormula(renormalise=False)),
        (
            "deepseek_v3",
            {},
            RouterFormula("sigmoid", groups=2, group_best=2, epsilon=1e-20, scale=2.5),
        ),
        ("deepseek_v2", {}, RouterFormula(renormalise=False, by_logits=True, groups=2, scale=2.5)),
        ("ernie4_5_moe", {}, RouterFormula()),
        ("minimax_m2", {}, RouterFormula("sigmoid")),
        ("afmoe", {"route_scale": 1.5}, RouterFormula("sigmoid", epsilon=1e-20, scale=1.5)),
        ("phimoe", {}, None),
    ],
)
def test_formulas_are_what_the_modeling_code_says(
    name: str, changes: dict[str, Any], formula: RouterFormula | None
) -> None:
    known = known_router(moe_blocks(families.build(name, **changes))[0])
    assert (None if known is None else known.formula) == formula


@pytest.mark.parametrize("name", families.ALL)
def test_families_of_the_table_but_some_are_fused(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        known = known_router(moe_blocks(families.build(name, dtype=dtype))[0])
        assert (known is None) == (name in families.OWN_ROUTER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "glm4_moe", "ernie4_5_moe", "minimax_m2", "afmoe"])
@pytest.mark.parametrize("skipping", [False, True])
def test_a_fused_router_gives_what_the_familys_own_code_gives(name: str, dtype: torch.dtype, skipping: bool) -> None:
    model = families.build(name, dtype=dtype)
    block = moe_blocks(model)[0]
    calls: list[tuple[tuple[Any, ...], tuple[Tensor, ...]]] = []
    handle = block.router.register_forward_hook(lambda module, args, out: calls.append((args, out)))
    tokens = {"input_ids": torch.arange(60).reshape(3, 20)}
    with torch.no_grad():
        model(**tokens)
        handle.remove()
        (args, (logits, weights, experts)) = calls[0]
        skip = torch.full((len(moe_blocks(model)), block.top_k - 1), 0.7) if skipping else None
        moe_ext.patch(model, skip=skip)
        calls_of_op = []
        route = ops.route

        def counting(*arguments: Any, **more: Any) -> Any:
            calls_of_op.append(arguments)
            return route(*arguments, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "route", counting)
            got_logits, got_weights, got_experts = block.router(*args)
    assert len(calls_of_op) == 1
    assert torch.equal(got_logits, logits)
    assert got_logits.dtype == logits.dtype
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[weights.dtype]
    dense, got = (torch.zeros(len(logits), block.num_experts + 1) for _ in range(2))
    dense.scatter_(1, experts, weights.float())
    got.scatter_(1, got_experts, got_weights)
    if skipping:
        total, heaviest = dense.sum(1, keepdim=True), dense.amax(1, keepdim=True)
        dense = dense.masked_fill(dense < 0.7 * heaviest, 0.0)
        dense = dense * total / dense.sum(1, keepdim=True)
        close = ((dense > 0) == (got > 0)).all(1)  # a weight at the threshold may fall on either side
        assert int(close.sum()) >= len(close) - 2
        dense, got = dense[close], got[close]
    torch.testing.assert_close(got, dense, rtol=4 * rounding, atol=1e-7)


def test_code_that_computes_something_else_runs_as_it_is() -> None:
    model = families.build("deepseek_v3")
    router = moe_blocks(model)[0].router
    forward = type(router).forward

    def squared(self: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
        logits, weights, experts = forward(self, hidden)
        return logits, weights.square(), experts

    changed = type("ChangedRouter", (type(router),), {"forward": squared})
    for block in moe_blocks(model):
        block.router.__class__ = changed
    assert known_router(moe_blocks(model)[0]) is None
    tokens = torch.arange(40).reshape(2, 20)
    expected = families.logits_of(model, tokens)
    got = families.logits_of(moe_ext.patch(model, skip=None), tokens)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
