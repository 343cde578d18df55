"""Compiled decoding: the tokens of uncompiled decoding, from one graph; and what is refused.

Which graph there is is tried with the backend that runs it as it is; inductor, which takes seconds, once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import CompileConfig, PreTrainedModel

import moe_ext
from moe_ext.models.blocks import moe_blocks
from moe_ext.runtime import compiled_decoding
from moe_ext.runtime.one_row import OneRow
from moe_ext.runtime.row_products import aten
from tests.support.batches import random_tokens
from tests.support.families import build
from tests.support.mixtral import THRESHOLDS, MixtralFactory


@pytest.fixture
def uncompiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding becomes one graph, which runs as it is."""

    def config() -> CompileConfig:
        found = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="eager")
        found._compile_all_devices = True
        return found

    torch._dynamo.reset()
    monkeypatch.setattr(compiled_decoding, "_compile_config", config)


def continued(model: PreTrainedModel, prompt: Tensor, **options: Any) -> Tensor:
    lengths = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **lengths, **options)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("uncompiled_graph")
@pytest.mark.parametrize(("name", "weights"), [("mixtral", None), ("mixtral", "int8"), ("deepseek_v3", None)])
def test_decoding_is_one_graph_that_prompts_share(name: str, weights: str | None) -> None:
    model = build(name, num_hidden_layers=2)
    if weights is not None:
        moe_ext.quantize(model, weights)
    blocks = moe_blocks(model)
    moe_ext.patch(model, skip=torch.full((len(blocks), blocks[0].top_k - 1), 0.5))
    expected = [continued(model, random_tokens(1, length)) for length in (5, 3)]
    before = graphs()
    options = moe_ext.compile_decoding(model, 16)
    assert graphs() == before + 1
    assert all(
        torch.equal(continued(model, random_tokens(1, length), **options), tokens)
        for length, tokens in zip((5, 3), expected, strict=True)
    )
    assert graphs() == before + 1


@pytest.mark.usefixtures("uncompiled_graph")
def test_thresholds_that_come_later_are_used(tiny_mixtral: MixtralFactory) -> None:
    model = moe_ext.patch(tiny_mixtral(num_hidden_layers=1))
    options = moe_ext.compile_decoding(model, 16)
    everything = torch.ones(1, 1)
    expected = continued(moe_ext.patch(model, skip=everything), random_tokens(1, 5))
    assert not torch.equal(expected, continued(moe_ext.unpatch(model), random_tokens(1, 5)))
    assert torch.equal(continued(moe_ext.patch(model, skip=everything), random_tokens(1, 5), **options), expected)


def test_compiled_by_inductor_a_model_generates_the_same_tokens(tiny_mixtral: MixtralFactory) -> None:
    model = moe_ext.patch(tiny_mixtral(num_hidden_layers=1), skip=THRESHOLDS[:1])
    expected = continued(model, random_tokens(1, 5))
    assert torch.equal(continued(model, random_tokens(1, 5), **moe_ext.compile_decoding(model, 16)), expected)


def test_a_compiler_that_is_missing_is_named(
    tiny_mixtral: MixtralFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config, cpp_builder

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(cpp_builder, "cpp_compiler_search", cpp_builder.cpp_compiler_search.__wrapped__)
    torch._dynamo.reset()
    model = moe_ext.patch(tiny_mixtral(num_hidden_layers=1, hidden_size=48))
    with pytest.raises(
        RuntimeError, match=r"decoding cannot be compiled: on the CPU torch\.compile needs a C\+\+ compil"
    ):
        moe_ext.compile_decoding(model, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 3}, "length is 3; expected a whole number of 4 or more"),
        ({"length": 8.0}, "length is 8.0; expected a whole number"),
        ({"length": 8, "batch_size": 0}, "batch_size is 0; expected a whole number of 1 or more"),
    ],
)
def test_lengths_that_are_none_are_refused(
    tiny_mixtral: MixtralFactory, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        moe_ext.compile_decoding(tiny_mixtral(), **arguments)


def test_what_does_not_generate_is_refused(tiny_mixtral: MixtralFactory) -> None:
    with pytest.raises(TypeError, match="model is a MixtralModel; expected a transformers model that generates"):
        moe_ext.compile_decoding(tiny_mixtral().model, 8)


@pytest.mark.usefixtures("uncompiled_graph")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minimax", "MiniMaxForCausalLM: transformers does not compile its decoding: it has no static cache"),
        ("gpt_oss", r"GptOssForCausalLM: every token would be compiled anew: .* \(sliding windows\)"),
    ],
)
def test_a_family_without_a_static_cache_that_stays_the_same_is_refused(name: str, message: str) -> None:
    model = moe_ext.patch(build(name, num_hidden_layers=2))
    with pytest.raises(ValueError, match=message):
        moe_ext.compile_decoding(model, 8)


@pytest.mark.usefixtures("uncompiled_graph")
def test_code_that_is_not_one_graph_is_refused(tiny_mixtral: MixtralFactory) -> None:
    model = moe_ext.patch(tiny_mixtral(num_hidden_layers=1))
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: print(output.sum().item()))
    with pytest.raises(RuntimeError, match="MixtralForCausalLM: decoding cannot be compiled: "):
        moe_ext.compile_decoding(model, 8)


def test_more_tokens_repay_a_small_model_than_a_large_one() -> None:
    small, large = build("mixtral"), build("mixtral", hidden_size=256)
    assert compiled_decoding.tokens_that_repay(small) > compiled_decoding.tokens_that_repay(large) > 256


# ---- products with one row


def graph_of(*tensors: Tensor) -> torch.fx.GraphModule:
    """The graph of a Linear, given x, weight and perhaps bias, after the pass."""
    traced = make_fx(F.linear, tracing_mode="fake")(*tensors)
    OneRow()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return traced


def products_in(traced: torch.fx.GraphModule) -> int:
    return sum(
        len(traced.graph.find_nodes(op="call_function", target=each)) for each in (aten.mm.default, aten.addmm.default)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_with_one_row_is_a_sum_in_float32_that_is_rounded_once(dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(1, 1, 61), (37, 61), (37,)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes[: 3 if bias else 2]]
    traced = graph_of(*tensors)
    assert products_in(traced) == 0
    got = traced(*tensors)
    assert got.dtype == dtype
    assert got.shape == (1, 1, 37)
    x, weight, *_ = wide = [tensor.double() for tensor in tensors]
    # 61 products, their sum and the bias in float32, then one rounding.
    rounding = 63 * 2.0**-24 + {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[dtype]
    largest = float((weight.abs() @ x.abs().flatten()).max()) + 4.0
    torch.testing.assert_close(got.double(), F.linear(*wide), rtol=0, atol=2 * rounding * largest)


def test_a_product_with_two_rows_is_left_to_torch() -> None:
    assert products_in(graph_of(torch.randn(2, 8), torch.randn(6, 8))) == 1


# ---- attention of one query

FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default


def attention_graph(attend: Callable[..., Tensor], *tensors: Tensor) -> tuple[torch.fx.GraphModule, int]:
    """The graph of an attention after the pass, and how many of torch's are left in it."""
    traced = make_fx(attend, tracing_mode="fake")(*tensors)
    traced.graph.eliminate_dead_code()  # as inductor does: results that nobody takes
    OneRow()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return traced, len(traced.graph.find_nodes(op="call_function", target=FLASH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_of_one_query_is_sums_in_float32_that_are_rounded_once(
    dtype: torch.dtype, masked: bool, scale: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, rows, 24, generator=generator).to(dtype) for heads, rows in ((6, 1), (3, 11), (3, 11))
    )
    mask = torch.randn(2, 1, 1, 11, generator=generator).to(dtype)
    mask[0, ..., 7:] = -torch.inf

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
        found: Tensor = FLASH(q, k, v, attn_mask=mask if masked else None, scale=scale)[0]
        return found

    traced, left = attention_graph(attend, q, k, v, mask)
    assert left == 0
    got = traced(q, k, v, mask)
    assert got.dtype == dtype
    scores = q.double() @ k.double().repeat_interleave(2, dim=1).mT * (24**-0.5 if scale is None else scale)
    weights = (scores + mask.double() if masked else scores).softmax(-1)
    expected = weights @ v.double().repeat_interleave(2, dim=1)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=rounding + 1e-5, atol=1e-6)


@pytest.mark.parametrize(("queries", "causal", "result"), [(2, False, 0), (1, True, 0), (1, False, 1)])
def test_attention_of_more_queries_a_causal_one_and_its_logarithms_are_left_to_torch(
    queries: int, causal: bool, result: int
) -> None:
    q, k = torch.randn(1, 2, queries, 8), torch.randn(1, 2, 5, 8)
    traced, left = attention_graph(lambda q, k: FLASH(q, k, k, 0.0, causal)[result], q, k)
    assert left == 1
    assert torch.equal(traced(q, k), FLASH(q, k, k, 0.0, causal)[result])
