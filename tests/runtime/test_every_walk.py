"""The walk through the decoder layers of every family that goes through transformers' experts interface."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_ext
from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.models.blocks import evaluation_mode, moe_blocks
from moe_ext.runtime.course import course_of
from moe_ext.runtime.hidden_states import MappedStates, ParkedStates
from moe_ext.runtime.layer_walk import LayerInputs
from moe_ext.runtime.suspended import THREAD_NAME
from tests.support import every_family
from tests.support.every_family import batches_of

REFUSED = ("diffusion_gemma",)
"""Families that are refused in memory, too: an encoder's and a decoder's layers have the same experts."""

LOOPS = ("inkling2_loop",)
"""Families that run a layer more than once."""

MORE_THAN_STATES = {
    "gemma4": "decoder layer 0 is given a KVSharingDict, which layers may write to",
    "glm5_next": "returns more than hidden states",
    "glm_moe_dsa": "returns more than hidden states",
    "hy_v4": "returns more than hidden states",
    "hy_v4_vl": "returns more than hidden states",
    "inkling2": "depends on earlier layers than the one before",
    "inkling2_loop": "given something other than what the one before it returned",
    "mistral_large4": "returns more than hidden states",
    "zaya": "returns more than hidden states",
}
"""Families whose layers are given more than what the one before returned as hidden states, and what is said."""


def no_pass_is_left() -> bool:
    return not any(thread.name == THREAD_NAME for thread in threading.enumerate())


Routed = list[tuple[Tensor, Tensor]]
"""Of every layer, and in it of every batch, what the experts are given and what the router computes."""


def walked(model: Any, batches: list[dict[str, Tensor]], states: Any) -> Routed:
    blocks, found = moe_blocks(model), []
    with (
        torch.no_grad(),
        evaluation_mode(model),
        LayerInputs(model, blocks, batches, states=states) as inputs,
    ):
        for block in range(len(blocks)):
            inputs.observe(block, lambda batch, x, logits: found.append((x.clone(), logits.clone())))
    return found


def in_one_pass(model: Any, batches: list[dict[str, Tensor]]) -> Routed:
    """The same by the model's own forward pass of every batch."""
    found: dict[tuple[int, int], list[Tensor]] = {}
    handles = []
    for layer, block in enumerate(moe_blocks(model)):

        def look(module: Any, args: Any, output: Any, layer: int = layer) -> None:
            found[layer, index] = [output[0]]

        def enter(module: Any, args: Any, layer: int = layer) -> None:
            found[layer, index].insert(0, args[0].reshape(-1, args[0].shape[-1]))

        handles.append(block.router.register_forward_hook(look))
        handles.append(block.experts.register_forward_pre_hook(enter))
    with torch.no_grad(), evaluation_mode(model):
        for index, batch in enumerate(batches):  # noqa: B007  the closures read it
            model.base_model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [(x, logits) for _, (x, logits) in sorted(found.items())]


def assert_same_routed(got: Routed, expected: Routed) -> None:
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", [name for name in every_family.names() if name not in (*REFUSED, *LOOPS)])
def test_experts_are_given_in_a_walk_what_the_models_own_forward_gives_them(name: str, tmp_path: Path) -> None:
    model = every_family.build(name)
    batches, blocks = batches_of(model), moe_blocks(model)
    course, expected = course_of(model, blocks, batches), in_one_pass(model, batches)
    assert_same_routed(walked(model, batches, ParkedStates(0)), expected)  # all that waits lies in a file
    if name in MORE_THAN_STATES:
        assert MORE_THAN_STATES[name] in str(course.obstacle)
        with pytest.raises(ValueError, match="stores hidden states between decoder layers"):
            walked(model, batches, MappedStates(tmp_path, "walk", [4096, 4096], 0, hold=False))
        return
    assert course.obstacle is None
    sizes = [-(-batch["input_ids"].numel() * course.token_bytes // 4096) * 4096 for batch in batches]
    assert_same_routed(walked(model, batches, MappedStates(tmp_path, "walk", sizes, 0, hold=False)), expected)
    assert no_pass_is_left()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["inkling2_loop", "zaya", "deepseek_v4", "qwen4_exp"])
def test_scratch_is_used_or_refused_before_any_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every_family.build(name, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    model = moe_ext.from_pretrained(tmp_path / "source")
    (tmp_path / "scratch").mkdir()
    options: dict[str, Any] = {"progress": False, "strict": False}
    if name not in MORE_THAN_STATES:  # deepseek_v4 has hyper-connections: several hidden states a token
        expected = moe_ext.calibrate(model, batches_of(model), **options)
        options["scratch"] = tmp_path / "scratch"
        got = moe_ext.calibrate(tmp_path / "source", batches_of(model), **options)
        assert all(torch.equal(got.tensors()[key], tensor) for key, tensor in expected.tensors().items())
    else:
        monkeypatch.setattr(LayersOnDisk, "need", None)  # no layer is loaded
        with pytest.raises(ValueError, match=f"scratch stores hidden states .* {MORE_THAN_STATES[name]}"):
            moe_ext.calibrate(tmp_path / "source", batches_of(model), scratch=tmp_path / "scratch", **options)
    assert list((tmp_path / "scratch").iterdir()) == []
