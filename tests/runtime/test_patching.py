"""patch and unpatch on small random Mixtral models, against the unpatched model."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

import moe_ext
from moe_ext.models.blocks import moe_blocks
from moe_ext.runtime.patching import active_thresholds, is_patched
from tests.support.batches import random_tokens
from tests.support.families import logits_of
from tests.support.mixtral import THRESHOLDS, MixtralFactory
from tests.support.reference import DEVICES, DTYPES


def skip_in_eager(model: MixtralForCausalLM, thresholds: torch.Tensor) -> None:
    """NAEE's rule (K = 2), written into stock router outputs by a hook: the independent reference for skipping."""

    def rule(threshold: float) -> Any:
        def after(router: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits, weights, experts = output
            skip = weights[:, 1] < threshold * weights[:, 0]
            weights = torch.where(skip[:, None], torch.tensor([1.0, 0.0]).to(weights), weights)
            experts = torch.stack([experts[:, 0], experts[:, 1].masked_fill(skip, 8)], 1)
            return logits, weights, experts

        return after

    for layer, threshold in zip(model.model.layers, thresholds[:, 0].tolist(), strict=True):
        layer.mlp.gate.register_forward_hook(rule(threshold))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_patched_logits_equal_unpatched(
    tiny_mixtral: MixtralFactory, device: str, dtype: torch.dtype, implementation: str
) -> None:
    model = tiny_mixtral(dtype=dtype).to(device)
    model.set_experts_implementation(implementation)
    tokens = random_tokens(2, 23)
    expected = logits_of(model, tokens)
    got = logits_of(moe_ext.patch(model), tokens)
    # The stock path rounds to the dtype after every step of every layer: some 8 roundings a layer, 3 layers.
    tolerance = 24 * {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    differ = ((got - expected).abs() > tolerance * expected.abs().max()).any(-1)
    # In 16 bits two experts of a token may be as good as each other: on an H100 one token took another.
    assert int(differ.sum()) <= (0 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("device", DEVICES)
def test_generated_tokens_equal_the_unpatched_models(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = tiny_mixtral().to(device)
    tokens = random_tokens(2, 5).to(device)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **options)
    assert torch.equal(moe_ext.patch(model).generate(tokens, **options), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_stay_the_models_own_parameters(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = tiny_mixtral().to(device)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    moe_ext.patch(model, skip=THRESHOLDS)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("device", DEVICES)
def test_unpatch_restores_the_model_to_the_bit(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = tiny_mixtral().to(device)
    model.set_experts_implementation("eager")
    tokens = random_tokens(2, 9)
    expected, config = logits_of(model, tokens), model.config.to_dict()
    router_attributes = set(vars(model.model.layers[0].mlp.gate))
    moe_ext.unpatch(moe_ext.patch(model, skip=THRESHOLDS))
    assert torch.equal(logits_of(model, tokens), expected)
    assert model.config.to_dict() == config
    assert model.get_experts_implementation() == {"": "eager"}
    assert set(vars(model.model.layers[0].mlp.gate)) == router_attributes
    assert not is_patched(model)


def test_unpatching_an_unpatched_model_changes_nothing(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    assert moe_ext.unpatch(model) is model
    assert model.get_experts_implementation() == {"": "grouped_mm"}


@pytest.mark.parametrize("device", DEVICES)
def test_patching_twice_replaces_the_thresholds(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = tiny_mixtral().to(device)
    tokens = random_tokens(2, 9)
    expected = logits_of(moe_ext.patch(model), tokens)
    skipping = logits_of(moe_ext.patch(model, skip=torch.ones(3, 1)), tokens)
    assert not torch.allclose(skipping, expected)
    moe_ext.patch(model)  # "config": the thresholds that the patch before wrote there
    assert torch.equal(logits_of(model, tokens), skipping)
    moe_ext.patch(model, skip=None)
    assert torch.equal(logits_of(model, tokens), expected)
    assert not hasattr(model.config, "moe_ext")
    moe_ext.unpatch(model)
    assert model.get_experts_implementation() == {"": "grouped_mm"}


@pytest.mark.parametrize("device", DEVICES)
def test_a_deep_copy_of_a_patched_model_stands_alone(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = moe_ext.patch(tiny_mixtral().to(device), skip=THRESHOLDS)
    tokens = random_tokens(1, 8)
    expected = logits_of(model, tokens)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    assert torch.equal(logits_of(twin, tokens), expected)


# ---- skipping


@pytest.mark.parametrize("device", DEVICES)
def test_skipping_equals_the_papers_rule_on_the_stock_model(tiny_mixtral: MixtralFactory, device: str) -> None:
    stock, patched = tiny_mixtral().to(device), tiny_mixtral().to(device)
    stock.set_experts_implementation("eager")
    skip_in_eager(stock, THRESHOLDS)
    tokens = random_tokens(3, 20)
    moe_ext.patch(patched, skip=THRESHOLDS)
    with moe_ext.count_skips(patched) as count:
        got = logits_of(patched, tokens)
    assert 0.05 < count.rate() < 0.5
    torch.testing.assert_close(got, logits_of(stock, tokens), rtol=1e-4, atol=1e-4)


def test_thresholds_are_saved_in_the_config_and_read_from_it(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    model = moe_ext.patch(tiny_mixtral(), skip=THRESHOLDS)
    tokens = random_tokens(2, 9)
    expected = logits_of(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path)
    unskipped = logits_of(loaded, tokens)  # stock: does not skip
    assert not torch.allclose(unskipped, expected)
    moe_ext.patch(loaded)
    assert torch.equal(logits_of(loaded, tokens), expected)
    torch.testing.assert_close(active_thresholds(loaded), THRESHOLDS)
    moe_ext.patch(loaded, skip=None)
    torch.testing.assert_close(logits_of(loaded, tokens), unskipped, rtol=1e-4, atol=1e-4)


def test_the_betas_of_naees_code_are_read(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    model.config.betas = {"0": 0.6, "1": 0.4, "2": 0.8}
    torch.testing.assert_close(active_thresholds(moe_ext.patch(model)), THRESHOLDS)


@pytest.mark.parametrize("betas", [{"0": 0.5}, {"0": 0.5, "1": 0.5, "3": 0.5}, [0.5, 0.5, 0.5]])
def test_betas_that_do_not_fit_the_layers_are_refused(tiny_mixtral: MixtralFactory, betas: Any) -> None:
    model = tiny_mixtral()
    model.config.betas = betas
    with pytest.raises(ValueError, match="expected a dict with the keys 0, 1, 2"):
        moe_ext.patch(model)
    assert not is_patched(model)


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (torch.zeros(3), r"skip thresholds have shape \(3,\); expected \(3, 1\) = \(MoE layers, top_k - 1\)"),
        (torch.zeros(2, 1), r"skip thresholds have shape \(2, 1\); expected \(3, 1\)"),
        (torch.tensor([[0.1], [1.5], [0.0]]), "must be numbers from 0 to 1"),
        (torch.tensor([[0.1], [torch.nan], [0.0]]), "must be numbers from 0 to 1"),
        ("median", "skip is 'median'; expected thresholds, 'config' or None"),
    ],
)
def test_bad_thresholds_leave_the_model_unpatched(tiny_mixtral: MixtralFactory, skip: Any, message: str) -> None:
    model = tiny_mixtral()
    with pytest.raises(ValueError, match=message):
        moe_ext.patch(model, skip=skip)
    assert not is_patched(model)
    assert not hasattr(model.config, "moe_ext")


# ---- gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradients_equal_the_unpatched_models(tiny_mixtral: MixtralFactory, device: str, implementation: str) -> None:
    stock, patched = tiny_mixtral().to(device), tiny_mixtral().to(device)
    tokens = random_tokens(2, 11).to(device)
    for model in (stock, patched):
        model.set_experts_implementation(implementation)
    moe_ext.patch(patched)
    for model in (stock, patched):
        model(tokens, labels=tokens).loss.backward()
    for (name, expected), (_, got) in zip(stock.named_parameters(), patched.named_parameters(), strict=True):
        assert expected.grad is not None, name
        assert got.grad is not None, name
        if device == "cpu":
            assert torch.equal(got.grad, expected.grad), name
        else:  # torch's own backward sums with atomics there
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_gradients_of_a_skipping_model_equal_the_rule_on_the_stock_model(
    tiny_mixtral: MixtralFactory, device: str, implementation: str
) -> None:
    stock, patched = tiny_mixtral().to(device), tiny_mixtral().to(device)
    tokens = random_tokens(2, 11).to(device)
    stock.set_experts_implementation("eager")
    patched.set_experts_implementation(implementation)
    skip_in_eager(stock, THRESHOLDS)
    with torch.inference_mode():  # thresholds made here must not break a later backward
        moe_ext.patch(patched, skip=THRESHOLDS.clone())
    for model in (stock, patched):
        model(tokens, labels=tokens).loss.backward()
    for (name, expected), (_, got) in zip(stock.named_parameters(), patched.named_parameters(), strict=True):
        assert expected.grad is not None, name
        assert got.grad is not None, name
        assert bool(((got.grad - expected.grad).abs() <= 1e-4 * expected.grad.abs() + 1e-6).all()), name


def test_forward_mode_gradients_equal_the_unpatched_models(tiny_mixtral: MixtralFactory) -> None:
    stock, patched = tiny_mixtral(), tiny_mixtral()
    for model in (stock, patched):  # torch's fused attention and grouped products have no forward mode, and say so
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
    moe_ext.patch(patched)
    embedded = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    router = "model.layers.1.mlp.gate.weight"

    def derivative(model: MixtralForCausalLM, of: str) -> torch.Tensor:
        weight = model.get_parameter(router).detach()

        def logits(embedded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, {router: weight}, (), {"inputs_embeds": embedded}).logits

        tangents = tuple(torch.ones_like(value) * (of == name) for name, value in (("x", embedded), ("w", weight)))
        with torch.no_grad():
            return torch.func.jvp(logits, (embedded, weight), tangents)[1]

    for of in ("x", "w"):
        expected = derivative(stock, of)
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(derivative(patched, of), expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_router_below_trained_experts_has_gradients(tiny_mixtral: MixtralFactory) -> None:
    stock, patched = tiny_mixtral(), moe_ext.patch(tiny_mixtral())
    for model in (stock, patched):
        if model is stock:
            model.set_experts_implementation("eager")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.0.mlp.experts" in name)
        model(random_tokens(1, 7), labels=random_tokens(1, 7)).loss.backward()
    expected = stock.model.layers[0].mlp.experts.down_proj.grad
    torch.testing.assert_close(patched.model.layers[0].mlp.experts.down_proj.grad, expected, rtol=1e-4, atol=1e-6)


# ---- what a patched model goes through


def test_a_patched_model_survives_pickling(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    model = moe_ext.patch(tiny_mixtral(), skip=THRESHOLDS)
    tokens = random_tokens(1, 8)
    expected = logits_of(model, tokens)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits_of(loaded, tokens), expected)
    assert loaded.model.layers[0].mlp.gate.forward.args[0] is loaded.model.layers[0].mlp.gate


@pytest.mark.parametrize("device", DEVICES)
def test_patching_again_selects_the_implementation_again(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = moe_ext.patch(tiny_mixtral().to(device))
    tokens = random_tokens(1, 8)
    expected = logits_of(model, tokens)
    for other in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(other)  # transformers' experts below our router
        torch.testing.assert_close(logits_of(model, tokens), expected, rtol=1e-4, atol=1e-4)
        moe_ext.patch(model)
        assert model.get_experts_implementation() == {"": "moe_ext"}
    assert moe_ext.unpatch(model).get_experts_implementation() == {"": "grouped_mm"}


def test_static_cache_generates_the_unpatched_models_tokens(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    tokens = random_tokens(1, 5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(tokens, **options)
    assert torch.equal(moe_ext.patch(model).generate(tokens, **options), expected)


@pytest.mark.parametrize("skip", [None, THRESHOLDS])
def test_a_patched_model_compiles_whole(tiny_mixtral: MixtralFactory, skip: torch.Tensor | None) -> None:
    model = moe_ext.patch(tiny_mixtral(), skip=skip)
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        # The same operators in the same order; only torch's own decompositions may round otherwise.
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


# ---- what cannot be patched


def test_a_model_patched_in_part_is_refused(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    moe_ext.patch(model.model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp is patched already as part of another model"):
        moe_ext.patch(model)
    moe_ext.unpatch(model.model)
    moe_ext.unpatch(moe_ext.patch(model))


def test_a_router_whose_forward_was_replaced_is_refused(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    router = model.model.layers[2].mlp.gate
    router.forward = lambda x: type(router).forward(router, x)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp: the router's forward was replaced on the instance"):
        moe_ext.patch(model)
    assert "forward" in vars(router)
    assert not is_patched(model)


def test_a_subclass_of_the_block_is_patched_too(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    block = model.model.layers[1].mlp
    block.__class__ = type("Wrapped", (type(block),), {})
    moe_ext.patch(model)
    assert hasattr(block.gate, "_moe_ext")


def test_a_layer_without_experts_is_left_alone(tiny_mixtral: MixtralFactory) -> None:
    model, tokens = tiny_mixtral(), random_tokens(2, 7)
    model.model.layers[1].mlp = nn.Identity()
    expected = logits_of(model, tokens)
    torch.testing.assert_close(logits_of(moe_ext.patch(model), tokens), expected, rtol=1e-4, atol=1e-4)
    assert [block.name for block in moe_blocks(model)] == ["model.layers.0.mlp", "model.layers.2.mlp"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda e: e.register_parameter("scale", nn.Parameter(torch.ones(8))),
            "parameters .*'scale'.*expected plain",
        ),
        (lambda e: nn.utils.parametrizations.weight_norm(e, "down_proj"), "has parameters .*; expected plain"),
        (lambda e: setattr(e, "down_proj", nn.Parameter(e.down_proj.half())), "down_proj has another dtype or device"),
        (
            lambda e: setattr(e, "down_proj", nn.Parameter(e.down_proj.data.mT.contiguous().mT)),
            "down_proj is not contiguous",
        ),
        (lambda e: setattr(e, "down_proj", nn.Parameter(e.down_proj[:5])), "down_proj has 5 experts; expected 8"),
    ],
)
def test_experts_with_other_weights_are_refused(tiny_mixtral: MixtralFactory, damage: Any, message: str) -> None:
    model = tiny_mixtral()
    damage(model.model.layers[0].mlp.experts)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp: .*" + message):
        moe_ext.patch(model)
    assert not is_patched(model)


def test_a_model_without_moe_layers_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(
        ValueError,
        match=r"LlamaForCausalLM has no MoE layers that are supported: no module of it goes through .*'llama'",
    ):
        moe_ext.patch(LlamaForCausalLM(config))


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        moe_ext.patch(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "model.layers.0.mlp: dtype torch.float64 is not supported; use float32"),
        ({"hidden_act": "relu"}, "model.layers.0.mlp: MixtralExperts: its gating function .activation ReLU. gives"),
    ],
)
def test_unsupported_dtypes_and_activations_are_refused(
    tiny_mixtral: MixtralFactory, change: dict[str, Any], message: str
) -> None:
    model = tiny_mixtral(**change)
    with pytest.raises(ValueError, match=message):
        moe_ext.patch(model)
    assert model.get_experts_implementation() == {"": "grouped_mm"}


def test_a_router_of_another_size_than_its_experts_is_refused(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    model.model.layers[2].mlp.gate.weight = nn.Parameter(torch.zeros(7, 32))
    message = r"layers\.2\.mlp: the router's weight has shape \(7, 32\); expected 8 experts along dimension 0"
    with pytest.raises(ValueError, match=message):
        moe_ext.patch(model)


def test_what_experts_compute_decides_and_not_what_their_config_names(tiny_mixtral: MixtralFactory) -> None:
    model, tokens = tiny_mixtral(), torch.arange(9)[None]
    model.model.layers[2].mlp.experts.act_fn = nn.GELU()
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(moe_ext.patch(model)(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    model = tiny_mixtral()
    model.model.layers[2].mlp.experts.act_fn = nn.ReLU()
    with pytest.raises(ValueError, match=r"layers\.2\.mlp: MixtralExperts: its gating function \(activation ReLU\)"):
        moe_ext.patch(model)


def test_an_unsupported_device_is_refused(tiny_mixtral: MixtralFactory) -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp: gate_up_proj is on the meta device; load the"):
        moe_ext.patch(tiny_mixtral().to("meta"))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("is_transposed", True, r"transposed weights .* gate_up_proj \(8, 80, 32\), down_proj \(8, 32, 40\)"),
        ("has_bias", True, "parameters .*; expected plain .*'down_proj_bias'"),
        ("has_gate", False, "parameters .*; expected plain .*'up_proj'"),
        ("has_post_expert_norm", True, "a norm after each expert, which moe_ext does not support"),
    ],
)
def test_experts_with_another_layout_are_refused(
    tiny_mixtral: MixtralFactory, flag: str, value: bool, message: str
) -> None:
    model = tiny_mixtral()
    setattr(model.model.layers[1].mlp.experts, flag, value)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp: MixtralExperts.* " + message):
        moe_ext.patch(model)
    assert not is_patched(model)


# ---- how it fits into transformers


@pytest.mark.parametrize("device", DEVICES)
def test_router_logits_are_still_recorded(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = tiny_mixtral().to(device)
    tokens = random_tokens(1, 6).to(device)
    with torch.no_grad():
        expected = model(tokens, output_router_logits=True).router_logits
        got = moe_ext.patch(model)(tokens, output_router_logits=True).router_logits
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_implementation_can_be_named_when_loading(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    model = tiny_mixtral()
    tokens = random_tokens(1, 6)
    model.save_pretrained(tmp_path)
    named = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_ext")
    torch.testing.assert_close(logits_of(named, tokens), logits_of(model, tokens), rtol=1e-4, atol=1e-4)
    for model in (named, moe_ext.patch(named)):  # the differentiable path is eager, with and without patch
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        assert model.model.layers[0].mlp.experts.down_proj.grad is not None


def test_a_patched_model_saves_a_config_that_stock_transformers_reads(
    tiny_mixtral: MixtralFactory, tmp_path: Path
) -> None:
    moe_ext.patch(tiny_mixtral()).save_pretrained(tmp_path)
    assert "moe_ext" not in (tmp_path / "config.json").read_text()


def test_a_patched_block_compiles_without_graph_breaks(tiny_mixtral: MixtralFactory) -> None:
    model = moe_ext.patch(tiny_mixtral(), skip=THRESHOLDS)
    block = model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_keeps_the_input_dtype(tiny_mixtral: MixtralFactory, device: str) -> None:
    model = tiny_mixtral(dtype=torch.bfloat16).to(device)
    experts = moe_ext.patch(model).model.layers[0].mlp.experts
    x = torch.randn(3, 32).to(device)
    with torch.no_grad():
        out = experts(x, torch.tensor([[0, 1]] * 3).to(device), torch.full((3, 2), 0.5).to(device))
    assert out.dtype == torch.float32


def test_an_old_torch_gives_one_clear_import_error() -> None:
    from moe_ext.binary import require_torch

    with pytest.raises(ImportError, match=r"moe_ext needs torch >= 2.10, found 2.9.1\+cpu. Run: pip install"):
        require_torch("2.9.1+cpu")
    for fine in ("2.10.0", "2.13.0+cpu", "3.0"):
        require_torch(fine)


def test_a_binary_that_does_not_load_gives_one_clear_import_error(tmp_path: Path) -> None:
    source = Path(moe_ext.__file__).parent
    (tmp_path / "moe_ext").mkdir()
    for file in source.glob("*.py"):
        (tmp_path / "moe_ext" / file.name).write_text(file.read_text())
    (tmp_path / "moe_ext" / "_C.py").write_text("raise ImportError('wrong ELF class')")
    result = subprocess.run(
        [sys.executable, "-c", "import moe_ext"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "ImportError: moe_ext's compiled extension cannot be loaded (wrong ELF class)" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr
