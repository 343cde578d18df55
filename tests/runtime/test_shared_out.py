"""Patched models that transformers shares out among processes, against the same model in one."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed.configuration_utils import DistributedConfig

import moe_ext
from moe_ext.models.blocks import moe_blocks
from moe_ext.runtime.patching import is_patched
from tests.support.batches import padded_batches, random_tokens
from tests.support.families import build, keep_of, logits_of, plan_for
from tests.support.forked import results_of_group

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.accelerator.is_available(), reason="transformers would take an accelerator a process"),
]

WAYS: dict[str, dict[str, Any]] = {
    "tensor": {"tp_size": 2},
    "masked": {"tp_size": 2, "ep_size": 2},
    "exchanged": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
}
"""Parallelisms of two processes: parts of every expert; some experts, other processes' slots masked, or sent there."""

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3")
TOKENS = random_tokens(2, 9)
MASK = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])


def thresholds_for(model: Any) -> Tensor:
    blocks = moe_blocks(model)
    return torch.full((len(blocks), blocks[0].top_k - 1), 0.6)


def shared_out(kind: Callable[..., Any], folder: Path, way: dict[str, Any]) -> Any:
    return kind(folder, distributed_config=DistributedConfig(**way)).eval()


def behaviour(model: Any, skip: Tensor) -> dict[str, Any]:
    """Logits, greedy tokens and counts of a model that skips."""
    moe_ext.patch(model, skip=skip)
    found: dict[str, Any] = {"logits": logits_of(model, TOKENS, attention_mask=MASK)}
    with moe_ext.count_skips(model) as count:
        found["tokens"] = model.generate(
            TOKENS, attention_mask=MASK, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
        )
    found["slots"], found["skipped"] = count.slots, count.skipped
    moe_ext.unpatch(model)
    found["stock"] = logits_of(model, TOKENS, attention_mask=MASK)
    return found


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    # float32 sums in another order, through three layers: a few units in the last place of logits of about 10.
    for name in ("logits", "stock"):
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=5e-5)
    assert torch.equal(got["tokens"], expected["tokens"])
    assert (got["slots"], got["skipped"]) == (expected["slots"], expected["skipped"])
    assert sum(got["skipped"]) > 0


def gradients(model: Any, skip: Tensor) -> dict[str, Tensor]:
    """Of the routers, and of the embedding below all layers, in a step of training that skips."""
    moe_ext.patch(model, skip=skip).train()
    model(TOKENS, attention_mask=MASK, labels=TOKENS).loss.backward()
    parameters = {block.name: block.router.get_parameter("weight") for block in moe_blocks(model)}
    parameters["embedding"] = model.get_input_embeddings().weight
    grads: dict[str, Any] = {name: parameter.grad for name, parameter in parameters.items()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def assert_gradients_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def assert_shared_out_same(
    count: int,
    load: Callable[[dict[str, Any]], Any],
    ways: Iterable[dict[str, Any]],
    model: Any,
    folder: Path,
    what: Callable[..., dict[str, Any]] = behaviour,
    same: Callable[..., None] = assert_same,
) -> None:
    """In each of ``count`` processes the model, loaded in each of the ways, does what it does in this one."""
    skip = thresholds_for(model)
    found = results_of_group(count, lambda: [what(load(way), skip) for way in ways], folder)
    expected = what(model, skip)  # after the others are forked: autograd's threads are not
    for results in found:
        for got in results:
            same(got, expected)


NOT_FORKED = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch's CUDA build does not differentiate once it is forked"
)


@pytest.mark.parametrize(
    ("name", "ways", "what", "same"),
    [
        *((name, tuple(WAYS), behaviour, assert_same) for name in FAMILIES),
        ("gpt_oss", ("masked",), behaviour, assert_same),  # experts with biases
        pytest.param("mixtral", tuple(WAYS), gradients, assert_gradients_same, marks=NOT_FORKED),
    ],
)
def test_two_processes_skip_as_one_does(
    name: str, ways: tuple[str, ...], what: Callable[..., Any], same: Callable[..., None], tmp_path: Path
) -> None:
    model: Any = build(name)
    model.save_pretrained(tmp_path)
    load = partial(shared_out, type(model).from_pretrained, tmp_path)
    assert_shared_out_same(2, load, [WAYS[way] for way in ways], model, tmp_path, what, same)


@pytest.mark.parametrize(("count", "way"), [(3, {"tp_size": 3}), (2, {"tp_size": 2, "ep_size": 2})])
def test_layers_that_differ_are_shared_out(count: int, way: dict[str, Any], tmp_path: Path) -> None:
    model: Any = build("deepseek_v3", n_group=1, num_nextn_predict_layers=0)  # its heads are in every process
    moe_ext.prune(model, plan_for(model, keep_of(model, "deepseek_v3", fewer=2)))
    assert len({block.num_experts for block in moe_blocks(model)}) == 2
    model.save_pretrained(tmp_path / "uneven")
    load = partial(shared_out, moe_ext.from_pretrained, tmp_path / "uneven")
    assert_shared_out_same(count, load, [way], model, tmp_path)


JOBS: dict[str, Callable[[Any], Any]] = {
    "calibrate": lambda model: moe_ext.calibrate(model, padded_batches(), progress=False),
    "search": lambda model: moe_ext.search(model, padded_batches(), keep=5, progress=False),
    "score": lambda model: moe_ext.aimer(model),
    "prune": lambda model: moe_ext.prune(model, plan_for(model, keep_of(model, "mixtral"))),
}


def refusal(job: Callable[[], object]) -> str:
    try:
        job()
    except ValueError as error:
        return str(error)
    return "none"


def test_what_needs_whole_experts_is_refused_before_anything_changes(tmp_path: Path) -> None:
    plain: Any = build("mixtral")
    plain.save_pretrained(tmp_path)

    def work() -> dict[str, Any]:
        said: dict[str, Any] = {}
        for key in ("tensor", "masked"):
            model = shared_out(type(plain).from_pretrained, tmp_path, WAYS[key])
            for job, run in JOBS.items():
                said[f"{job}, {key}"] = refusal(partial(run, model))
            said[f"left, {key}"] = is_patched(model), logits_of(model, TOKENS)
        for key, way in {"fsdp": {"fsdp_size": 2}, "pipeline": {"pp_size": 2}}.items():
            model = shared_out(type(plain).from_pretrained, tmp_path, way)
            said[key] = refusal(partial(moe_ext.patch, model)), is_patched(model)
        mesh = init_device_mesh("cpu", (2,))
        for layer in plain.model.layers:
            layer.mlp.experts.down_proj = nn.Parameter(distribute_tensor(layer.mlp.experts.down_proj.data, mesh))
        said["by hand"] = refusal(partial(moe_ext.patch, plain)), is_patched(plain)
        return said

    said = results_of_group(2, work, tmp_path)[0]
    for job in JOBS:
        assert said[f"{job}, tensor"].startswith(
            "model.layers.0.mlp: tensor parallelism leaves this process a part of each of the layer's experts; "
            f"{job} a model that is loaded without it, or the checkpoint's folder layer by layer"
        )
        assert "expert parallelism leaves this process 4 of the layer's experts" in said[f"{job}, masked"]
    for key in ("tensor", "masked"):
        patched, logits = said[f"left, {key}"]
        assert not patched
        torch.testing.assert_close(logits, logits_of(plain, TOKENS), rtol=0, atol=5e-5)
    reasons = {
        "fsdp": "FSDP gathers the model's weights",
        "pipeline": "pipeline parallelism leaves this process some of the model's layers",
        "by hand": "model.layers.0.mlp: MixtralExperts has DTensors beside a whole gate_up_proj",
    }
    for key, reason in reasons.items():
        message, patched = said[key]
        assert message.startswith(reason)
        assert not patched


def test_means_in_the_place_of_experts_are_not_shared_out(tmp_path: Path) -> None:
    model: Any = build("mixtral")
    stats = moe_ext.calibrate(model, padded_batches(), outputs=True, progress=False)
    moe_ext.prune(model, plan_for(model, keep_of(model, "mixtral")), novices=stats)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tp_size: .* has means in the place of removed experts"):
        moe_ext.from_pretrained(tmp_path, tp_size=2)
