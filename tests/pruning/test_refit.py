"""Refits of down projections, against least squares on what stock transformers computes, and from the folder."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

import moe_ext
from moe_ext.calibration.routed_inputs import RoutedInputs
from moe_ext.commands.main import app
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import expert_tensors, moe_blocks
from moe_ext.pruning import refit_files, refit_layers
from moe_ext.pruning.prune import prune
from moe_ext.pruning.prune_folder import prune_checkpoint
from moe_ext.pruning.refit import EXPERT_DAMPING, OutputFit, ridge_for
from moe_ext.runtime.formulas import ExpertsLayer, Formula
from moe_ext.runtime.patching import is_patched, patch
from moe_ext.storage.spilled_tensors import SpillingList
from tests.support.checkpoints import tensors_in
from tests.support.families import ALL, STOCK_ONLY, build, channels_for, keep_of, on_experts, plan_for

FAMILIES = [name for name in ALL if name not in STOCK_ONLY and name != "jamba"]


@contextmanager
def warnings_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def text(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        mask = torch.ones(4, 21, dtype=torch.int64)
        mask[1, 16:] = 0
        made.append({"input_ids": torch.randint(3, 96, (4, 21), generator=generator), "attention_mask": mask})
    return made


def thinner(model: PreTrainedModel, width: int = 12, removes: bool = False) -> PruningPlan:
    keep = keep_of(model, model.config.model_type) if removes else None
    blocks = moe_blocks(model)
    plan = plan_for(model, keep or tuple(tuple(range(block.num_experts)) for block in blocks))
    channels = channels_for(model, width)
    if keep:
        masks = tuple(
            tuple(masks[expert] for expert in row) for masks, row in zip(channels.masks, plan.keep, strict=True)
        )
        channels = replace(channels, masks=masks)
    return replace(plan, channels=channels)


Seen = list[tuple[Tensor, Tensor, Tensor, Tensor]]
"""Of every batch: x, experts and weights as a layer's experts get them, and the decoder layer's output (T, H)."""


def seen_by(model: PreTrainedModel, layer: int) -> Seen:
    """What stock transformers gives a layer's experts, counted tokens only, and what the decoder layer gives."""
    block = moe_blocks(model)[layer]
    decoder = next(module for name, module in model.named_modules() if name == block.name.rpartition(".")[0])
    routed: list[Any] = []
    outputs: list[Tensor] = []

    def hook(seen: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if seen == layer:
            routed.append(args[:3])

    handles = [*on_experts(model, hook)]
    handles.append(decoder.register_forward_hook(lambda module, args, output: outputs.append(output.flatten(0, 1))))
    with torch.no_grad():
        for batch in text():
            model.base_model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    masks = [batch["attention_mask"].reshape(-1).bool() for batch in text()]
    return [
        tuple(tensor[mask].double() if tensor.is_floating_point() else tensor[mask] for tensor in (*args, output))
        for args, output, mask in zip(routed, outputs, masks, strict=True)
    ]


def features(seen: Seen, gate_up: Tensor, expert: int, activation: Any) -> Tensor:
    """(tokens, I): g h of an expert; zero for tokens that do not come to it."""
    rows = []
    for x, experts, weights, _ in seen:
        gate, up = (x @ gate_up[expert].double().T).chunk(2, dim=-1)
        g = (weights * (experts == expert)).sum(1)
        rows.append(g[:, None] * activation(gate) * up)
    return torch.cat(rows)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_channels_are_fitted_by_least_squares_to_what_the_thinned_layers_before_give(family: str) -> None:
    model, step = build(family), build(family)
    plan = thinner(model)
    assert plan.channels is not None
    prune(model, plan, refit=text())
    for layer, block in enumerate(moe_blocks(step)):
        tensors = expert_tensors(block)
        seen = seen_by(step, layer)
        fitted = expert_tensors(moe_blocks(model)[layer])["down_proj"]
        for expert, kept in enumerate(plan.channels.indices(layer)):
            h = features(seen, tensors["gate_up_proj"], expert, block.experts.act_fn)
            tokens = int((h != 0).any(1).sum())
            down = tensors["down_proj"][expert].double()
            gram = h.T @ h
            removed = torch.ones(len(gram), dtype=torch.bool)
            removed[kept] = False
            damping = 0.01 * max(1.0, len(kept) / max(tokens, 1)) * gram.diagonal().mean()
            damped = gram[kept][:, kept] + damping * torch.eye(len(kept))
            expected = down[:, kept]
            if tokens:
                expected = expected + torch.linalg.solve(damped, gram[kept][:, removed] @ down.T[removed]).T
            torch.testing.assert_close(fitted[expert].double(), expected, rtol=2e-3, atol=2e-4)
            # The next layers see this one as it was fitted: zero where channels are gone.
            down.zero_()
            down[:, kept] = fitted[expert].double()
            tensors["down_proj"].data[expert] = down.float()


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "glm4_moe"])
def test_experts_are_fitted_to_the_hidden_states_of_the_unpruned_model(family: str) -> None:
    model, whole = build(family), build(family)
    plan = plan_for(model, keep_of(model, family))
    with pytest.warns(UserWarning, match="had few calibration tokens"):
        prune(model, plan, refit=text())
    # Brute force for the first layer: what comes before it is the same in both.
    pruned = prune(build(family), plan)
    block = moe_blocks(pruned)[0]
    seen, target = seen_by(pruned, 0), torch.cat([each[3] for each in seen_by(whole, 0)])
    tensors = expert_tensors(block)
    gate_up, down = tensors["gate_up_proj"], tensors["down_proj"].double()
    h = [features(seen, gate_up, expert, block.experts.act_fn) for expert in range(len(down))]
    scale = getattr(pruned.config, "residual_multiplier", 1.0)
    missing = (target - torch.cat([each[3] for each in seen])) / scale
    tokens = torch.tensor([int((each != 0).any(1).sum()) for each in h])
    ridge = EXPERT_DAMPING * ridge_for(tokens, down.shape[2], 10)
    flat = torch.cat(h, dim=1)
    gram = flat.T @ flat
    gram.diagonal().add_(ridge.repeat_interleave(down.shape[2]) * gram.diagonal().mean())
    change = torch.linalg.solve(gram, flat.T @ missing).view(len(down), down.shape[2], -1).transpose(1, 2)
    got = expert_tensors(moe_blocks(model)[0])["down_proj"].double()
    torch.testing.assert_close(got, down + change, rtol=2e-3, atol=5e-4)
    assert float(change.norm()) > 0.01 * float(down.norm())
    # And for all: the hidden states are nearer to the unpruned model's.
    with torch.no_grad():
        errors = [
            sum(
                float((each.base_model(**b).last_hidden_state - whole.base_model(**b).last_hidden_state).square().sum())
                for b in text()
            )
            for each in (model, pruned)
        ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("joint", [True, False])
def test_experts_are_fitted_all_together_or_one_after_the_other_in_two_sweeps(joint: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(3, 10, 6, generator=generator), torch.randn(3, 7, 5, generator=generator)
    x = torch.randn(40, 6, generator=generator)
    experts = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(40)])  # 3: a skipped slot
    weights = torch.rand(40, 2, generator=generator)
    wanted = torch.randn(40, 7, generator=generator)
    inputs, targets = RoutedInputs(), SpillingList(1 << 20)
    for part in (slice(0, 25), slice(25, 40)):
        inputs.add(x[part], experts[part], weights[part], None)
        targets.append(wanted[part])
    layer = ExpertsLayer(Formula(), gate_up, down)
    got = OutputFit(inputs, targets, layer).fit(most_joint=100 if joint else 0)
    h = torch.zeros(40, 3, 5, dtype=torch.float64)
    for token in range(40):
        for expert, weight in zip(experts[token].tolist(), weights[token], strict=True):
            if expert < 3:
                h[token, expert] = weight * layer.hidden(expert, x[token : token + 1])[0]
    flat = h.flatten(1)
    gram, tokens = flat.T @ flat, torch.tensor([int((experts == expert).sum()) for expert in range(3)])
    ridge = EXPERT_DAMPING * ridge_for(tokens, 5, 10)
    fitted = down.double().transpose(1, 2).reshape(15, 7)
    blocks = [slice(0, 15)] if joint else 2 * [slice(5 * expert, 5 * expert + 5) for expert in range(3)]
    for block in blocks:
        own = gram[block, block]
        strength = ridge.repeat_interleave(5)[block] * own.diagonal().mean()
        missing = wanted.double() - flat @ fitted
        fitted[block] += torch.linalg.solve(own + strength.diag(), flat[:, block].T @ missing)
    expected = fitted.view(3, 5, 7).transpose(1, 2).float()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("removes", [False, True])
def test_a_folder_is_refitted_byte_for_byte_as_in_memory(family: str, removes: bool, tmp_path: Path) -> None:
    if removes and family not in ("mixtral", "deepseek_v3", "phimoe"):
        pytest.skip("one of each layout is enough")
    build(family).save_pretrained(tmp_path / "model")
    # Not the model that was saved: products round by where weights lie in memory.
    model = moe_ext.from_pretrained(tmp_path / "model")
    plan = thinner(model, removes=removes)
    with warnings_ignored():
        prune(model, plan, refit=text())
        prune_checkpoint(tmp_path / "model", plan, tmp_path / "out", refit=text(), progress=False)
    model.save_pretrained(tmp_path / "memory")
    expected, got = tensors_in(tmp_path / "memory"), tensors_in(tmp_path / "out")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "memory").iterdir()
    )


@pytest.mark.parametrize("removes", [False, True])
def test_an_interrupted_refit_goes_on_to_the_same_bytes(
    removes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "model")
    plan = thinner(model, removes=removes)
    with warnings_ignored():
        prune_checkpoint(tmp_path / "model", plan, tmp_path / "whole", refit=text(), progress=False)
        fit, fitted = refit_layers._Refit.fit, list[int]()

        def killed(self: Any, layer: int, *args: Any) -> Tensor:
            if layer == 2 and 2 not in fitted:
                fitted.append(2)
                raise KeyboardInterrupt
            fitted.append(layer)
            return fit(self, layer, *args)

        monkeypatch.setattr(refit_layers._Refit, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(tmp_path / "model", plan, tmp_path / "out", refit=text(), progress=False)
        assert not (tmp_path / "out").exists()
        prune_checkpoint(tmp_path / "model", plan, tmp_path / "out", refit=text(), progress=False)
    assert fitted == [0, 1, 2, 2]  # the first two not again
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_other_text_does_not_go_on_with_an_unfinished_refit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "model")
    plan = thinner(model)
    write = vars(refit_files)["write_tensors"]

    def killed(path: Any, *args: Any) -> None:
        write(path, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(refit_files, "write_tensors", killed)
    with warnings_ignored(), pytest.raises(KeyboardInterrupt):
        prune_checkpoint(tmp_path / "model", plan, tmp_path / "out", refit=text(), progress=False)
    assert (tmp_path / ".out.partial" / "refit" / "0.safetensors").is_file()
    monkeypatch.undo()
    with warnings_ignored():
        prune_checkpoint(tmp_path / "model", plan, tmp_path / "out", refit=text(2), progress=False)
        prune_checkpoint(tmp_path / "model", plan, tmp_path / "fresh", refit=text(2), progress=False)
    names = ("out", "fresh")
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in names}) == 1


def test_a_patched_model_stays_patched_and_an_error_leaves_a_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    before = copy.deepcopy(model.state_dict())
    plan = thinner(model)
    hidden_of = RoutedInputs.gram

    def broken(self: RoutedInputs, expert: int, *args: Any) -> tuple[Tensor, int]:
        gram, tokens = hidden_of(self, expert, *args)
        return (gram * float("inf"), tokens) if expert == 5 else (gram, tokens)

    with monkeypatch.context() as patched, warnings_ignored():
        patched.setattr(RoutedInputs, "gram", broken)
        with pytest.raises(ValueError, match=r"refit: model.layers.0.mlp, expert 5 gave activations that"):
            prune(model, plan, refit=text())
    assert not is_patched(model)
    assert model.config.to_dict() == build("mixtral").config.to_dict()
    assert moe_blocks(model)[0].num_experts == 8
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with warnings_ignored():
        patch(model)
        prune(model, plan, refit=text())
        stock = prune(build("mixtral"), plan, refit=text())
    assert is_patched(model)
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_few_tokens_are_said_and_an_expert_without_any_keeps_its_columns() -> None:
    model, plain = build("mixtral"), build("mixtral")
    plan = thinner(model)
    few = [{"input_ids": torch.tensor([[5, 6, 7]])}]
    with pytest.warns(UserWarning, match=r"refit: \d+ experts had few calibration tokens .* 0 for 12 channels"):
        prune(model, plan, refit=few)
    prune(plain, plan)
    same = [
        [torch.equal(*pair) for pair in zip(*(expert_tensors(blocks)["down_proj"] for blocks in pair), strict=True)]
        for pair in zip(moe_blocks(model), moe_blocks(plain), strict=True)
    ]
    assert all(2 <= sum(row) < 8 for row in same)  # 3 tokens of two experts each reach 6 at most


def test_what_cannot_be_refitted_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "model")
    plan = thinner(model)
    padding = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.zeros(1, 4, dtype=torch.int64)}
    for batches in ([], [padding]):
        with pytest.raises(ValueError, match="refit: no token to fit to; 'batches' is empty, or every"):
            prune(model, plan, refit=batches)
        with pytest.raises(ValueError, match="refit: no token to fit to"):
            prune_checkpoint(tmp_path / "model", plan, tmp_path / "out", refit=batches, progress=False)
    stats = moe_ext.calibrate(model, text(), outputs=True, progress=False)
    with pytest.raises(ValueError, match="refit: kept experts make up for removed ones already by novices"):
        prune(model, plan_for(model, keep_of(model, "mixtral")), novices=stats, refit=text())
    with pytest.raises(ValueError, match="refit: the model skips experts"):
        prune(patch(build("mixtral"), skip=torch.full((3, 1), 0.5)), plan, refit=text())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert moe_blocks(model)[0].num_experts == 8


def test_a_layer_that_does_more_than_add_its_experts_outputs_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("mixtral")
    block = moe_blocks(model)[0]
    forward = type(block.module).forward

    def normed(self: nn.Module, hidden_states: Tensor) -> Tensor:
        output: Tensor = forward(self, hidden_states)
        return torch.nn.functional.normalize(output, dim=-1)

    monkeypatch.setattr(type(block.module), "forward", normed)
    with pytest.raises(ValueError, match=r"refit: model.layers.0.mlp: its decoder layer does not just add"):
        prune(model, plan_for(model, keep_of(model, "mixtral")), refit=text())
    with warnings_ignored():
        prune(model, thinner(model), refit=text())  # which asks nothing of the layer


def test_the_command_refits_and_asks_for_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("mixtral").save_pretrained(tmp_path / "model")
    model = moe_ext.from_pretrained(tmp_path / "model")
    plan = thinner(model)
    plan.save(tmp_path / "plan.json")
    (tmp_path / "text.txt").write_text("some text")
    monkeypatch.setattr("moe_ext.commands.prune.read_tokenizer", lambda *args, **options: None)
    monkeypatch.setattr("moe_ext.commands.reading.token_batches", lambda *args, **options: iter(text()))
    arguments = ["prune", str(tmp_path / "model"), str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]
    for wrong in (["--refit"], ["--text", str(tmp_path / "text.txt")]):
        assert CliRunner().invoke(app, arguments + wrong).exit_code == 2
    with warnings_ignored():
        result = CliRunner().invoke(app, [*arguments, "--refit", "--text", str(tmp_path / "text.txt"), "--json"])
        prune(model, plan, refit=text())
    assert result.exit_code == 0, result.output
    loaded = moe_ext.from_pretrained(tmp_path / "out")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
