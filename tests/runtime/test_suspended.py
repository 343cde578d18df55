"""Forward passes that wait at decoder layers: what ends them, what they leave, and the memory that they give up."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_ext
from moe_ext.models.blocks import moe_blocks
from moe_ext.runtime.backward_walk import OutputGradients
from moe_ext.runtime.base_forward import run_base
from moe_ext.runtime.course import Course, course_of, unwritten
from moe_ext.runtime.head_gradients import Labels
from moe_ext.runtime.hidden_states import ParkedStates
from moe_ext.runtime.layer_walk import LayerInputs
from moe_ext.runtime.suspended import THREAD_NAME, SuspendedForward, suspending
from tests.support import every_family, families
from tests.support.batches import padded_batches
from tests.support.mixtral import MixtralFactory


def waiting() -> int:
    return sum(thread.name == THREAD_NAME for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_pass_is_left() -> Iterator[None]:
    yield
    assert waiting() == 0


def in_frames(
    model: Any, batches: list[dict[str, Tensor]], memory: int = 1 << 20, course: Course | None = None
) -> LayerInputs:
    """The walk that models need whose layers are given more than hidden states."""
    return LayerInputs(model, moe_blocks(model), batches, course=course, states=ParkedStates(memory))


def untouched(model: nn.Module) -> bool:
    return not any("forward" in vars(module) for module in model.modules())


def test_passes_wait_one_a_batch_and_end_with_the_walk(tiny_mixtral: MixtralFactory) -> None:
    model, batches = tiny_mixtral(), padded_batches()
    with torch.no_grad(), in_frames(model, batches) as inputs:
        assert waiting() == 0  # nothing ran yet
        inputs.advance()
        assert waiting() == len(batches)
        assert untouched(model)
        inputs.advance()
        inputs.advance()
        assert waiting() == 0  # all three layers
        with pytest.raises(IndexError):
            inputs.advance()


def test_the_last_states_are_those_of_the_models_own_forward(tiny_mixtral: MixtralFactory) -> None:
    model, batches = tiny_mixtral(), padded_batches()
    with torch.no_grad(), in_frames(model, batches, 0) as inputs:
        for _ in range(3):
            inputs.advance()
        for index, batch in enumerate(batches):
            left: list[Tensor] = []
            handle = model.model.layers[2].register_forward_hook(lambda module, args, out, left=left: left.append(out))
            model.model(**batch)
            handle.remove()
            assert torch.equal(inputs.states(index), left[0])


class Stopped(Exception):  # noqa: N818  no error
    pass


def stopping(*args: Any, **kwargs: Any) -> Any:
    raise Stopped


@pytest.mark.parametrize("place", ["layer", "between"])
def test_what_the_models_code_raises_comes_out_and_ends_all_passes(tiny_mixtral: MixtralFactory, place: str) -> None:
    model, batches = tiny_mixtral(), padded_batches()
    course = course_of(model, moe_blocks(model), batches)
    if place == "layer":
        model.model.layers[1].self_attn.forward = stopping
    else:
        model.model.norm.forward = stopping

    def walk() -> None:
        with torch.no_grad(), in_frames(model, batches, course=course) as inputs:
            for _ in range(3):
                inputs.advance()

    with pytest.raises(Stopped):
        walk()
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_an_interrupted_walk_leaves_no_pass(tiny_mixtral: MixtralFactory) -> None:
    model, batches = tiny_mixtral(), padded_batches()

    def interrupt(batch: int) -> None:
        if batch == 1:
            raise KeyboardInterrupt

    def walk() -> None:
        with torch.no_grad(), in_frames(model, batches) as inputs:
            inputs.advance()
            inputs.advance(interrupt)

    with pytest.raises(KeyboardInterrupt):
        walk()
    assert untouched(model)


def test_states_beyond_the_memory_give_it_up_while_they_wait(tiny_mixtral: MixtralFactory) -> None:
    model, batches = tiny_mixtral(), padded_batches()
    with torch.no_grad(), in_frames(model, batches, 4000) as inputs:
        inputs.advance()
        sizes = [each.entry.args[0].untyped_storage().nbytes() for each in inputs._way._passes]  # type: ignore[attr-defined]
        whole = [batch["input_ids"].numel() * 32 * 4 for batch in batches]
        assert 0 < sum(sizes) <= 4000 < sum(whole)
        before = [inputs.states(batch).clone() for batch in range(len(batches))]
        assert all(bool(states.abs().sum() > 0) for states in before)
        seen: list[int] = []
        inputs.stay(after=lambda batch, states: seen.append(batch))
        assert seen == list(range(len(batches)))
        assert all(torch.equal(inputs.states(batch), states) for batch, states in enumerate(before))


def test_a_pass_runs_as_its_creator_does(tiny_mixtral: MixtralFactory) -> None:
    model, batch = tiny_mixtral(), padded_batches()[0]
    seen: dict[str, Any] = {}

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.update(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            cast=torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
            threads=torch.get_num_threads(),
            thread=threading.current_thread().name,
        )
        return embed(*args, **kwargs)

    embed = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = noting
    threads = torch.get_num_threads()
    for inference in (False, True):
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            one = SuspendedForward(lambda: run_base(model, batch))
            with suspending(model.model.layers):
                one.begin()
            assert one.entry is not None
            assert one.entry.layer == 0
            one.cancel()
        assert seen == {
            "grad": False, "inference": inference, "cast": torch.bfloat16, "threads": 1, "thread": THREAD_NAME,
        }  # fmt: skip
    assert torch.get_num_threads() == threads


def test_a_layer_that_runs_alone_is_not_suspended(tiny_mixtral: MixtralFactory) -> None:
    model, batch = tiny_mixtral(), padded_batches()[0]
    with torch.no_grad():
        expected = model(**batch).logits
        with suspending(model.model.layers):
            assert torch.equal(model(**batch).logits, expected)


# ---- the course


def test_the_course_of_a_plain_model_has_no_obstacle(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral(dtype=torch.bfloat16)
    course = course_of(model, moe_blocks(model), padded_batches())
    assert course == Course((0, 1, 2), 64, course.waiting_bytes, (32,), torch.bfloat16, None)
    assert untouched(model)


def test_the_course_of_a_loop_counts_its_calls() -> None:
    model = every_family.build("inkling2_loop")
    course = course_of(model, moe_blocks(model), [every_family.inputs(model, 1)])
    assert course.calls == (0, 1, *(2, 3) * 3)
    assert course.last_calls([0, 2, 3]) == [0, 6, 7]
    with pytest.raises(ValueError, match="search: decoder layer 2 runs 3 times in a forward pass; expected once"):
        course.refuse_loops("search")


def test_layers_that_share_what_they_write_are_an_obstacle() -> None:
    model = families.build("mixtral")
    batches, decoder = padded_batches(), type(model.model).forward

    def with_shared(*args: Any, **kwargs: Any) -> Any:
        return decoder(model.model, *args, shared=[], **kwargs)

    model.model.forward = with_shared
    obstacle = course_of(model, moe_blocks(model), batches).obstacle
    assert obstacle == "decoder layers 0 and 1 share a list"


def test_a_dict_that_a_layer_writes_to_is_said() -> None:
    layer, given = nn.Linear(1, 1), {"full": torch.zeros(1)}
    with unwritten(layer, ((), {"masks": given})):
        pass
    with pytest.raises(RuntimeError, match="a Linear writes to a dict"), unwritten(layer, ((), {"masks": given})):
        given["full"] = torch.ones(1)


def test_a_model_whose_code_needs_what_layers_compute_is_refused(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    model.model.norm.forward = stopping
    with pytest.raises(ValueError, match="cannot tell in which order a MixtralForCausalLM runs its decoder layers"):
        moe_ext.search(model, padded_batches(), keep=6, progress=False)


def test_fisher_refuses_layers_that_are_given_more_than_states() -> None:
    model = every_family.build("mistral_large4")  # a pair, and what all layers share
    batches = [every_family.inputs(model, 1)]
    with pytest.raises(ValueError, match="loss: 'fisher' stores hidden states between decoder layers, and in this mod"):
        OutputGradients(model, moe_blocks(model), batches, [None], Labels())
