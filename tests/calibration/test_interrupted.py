"""A calibration of a model in memory that is stopped goes on, and ends with the same bits."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_ext
from moe_ext.calibration import interrupted
from moe_ext.calibration.statistics import ExpertStatistics
from tests.support.batches import five_batches
from tests.support.letters import letter_tokenizer
from tests.support.mixtral import MixtralFactory

JOBS: dict[str, Any] = {
    "plain": (five_batches, {}),
    "everything": (five_batches, {"outputs": True, "channels": "energy"}),
    "domains": (
        lambda: [{**batch, "domain": "ab"[index % 2]} for index, batch in enumerate(five_batches())],
        {"outputs": True},
    ),
}


def same(one: ExpertStatistics, other: ExpertStatistics) -> None:
    assert one.every_tensor().keys() == other.every_tensor().keys()
    for name, tensor in one.every_tensor().items():
        assert torch.equal(tensor, other.every_tensor()[name]), name
    assert one.model_digest == other.model_digest


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
@pytest.mark.parametrize("done", [1, 3, 5])
def test_ctrl_c_leaves_a_state_from_which_the_same_call_goes_on(
    tiny_mixtral: MixtralFactory, tmp_path: Path, job: Any, done: int
) -> None:
    batches, options = job
    model, state = tiny_mixtral(), tmp_path / "state"
    expected = moe_ext.calibrate(model, batches(), progress=False, **options)

    def stopping() -> Iterator[Any]:
        for index, batch in enumerate(batches()):
            if index == done - 1:
                os.kill(os.getpid(), signal.SIGINT)  # what a terminal sends
            yield batch

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=f"interrupted after {done} batches, which are in {state}: the same"):
        moe_ext.calibrate(model, stopping(), progress=False, resume=state, **options)
    assert signal.getsignal(signal.SIGINT) == before
    ran = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    found = moe_ext.calibrate(model, batches(), progress=False, resume=state, **options)
    handle.remove()
    same(found, expected)
    assert len(ran) == 5 - done


def test_the_state_is_written_every_few_minutes(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    model, state = tiny_mixtral(), tmp_path / "state"

    def killed(after: int) -> Iterator[Any]:
        yield from five_batches()[:after]
        raise RuntimeError("killed")

    for minutes, there in ((10, False), (0, True)):
        with pytest.raises(RuntimeError, match="killed"):
            moe_ext.calibrate(model, killed(4), progress=False, resume=state, minutes=minutes)
        assert state.exists() == there
    same(
        moe_ext.calibrate(model, five_batches(), progress=False, resume=state),
        moe_ext.calibrate(model, five_batches(), progress=False),
    )


def test_a_state_of_another_run_is_refused(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    model, state = tiny_mixtral(), tmp_path / "state"
    moe_ext.calibrate(model, five_batches()[:3], progress=False, resume=state, minutes=0)
    content = state.read_bytes()
    others: list[tuple[Any, Any, dict[str, Any]]] = [
        (model, five_batches()[1:], {}),
        (model, five_batches()[:2], {}),
        (model, five_batches(), {"outputs": True}),
        (tiny_mixtral(seed=1), five_batches(), {}),
    ]
    for other, batches, options in others:
        with pytest.raises(ValueError, match="is of another run"):
            moe_ext.calibrate(other, batches, progress=False, resume=state, **options)
    assert state.read_bytes() == content
    state.write_bytes(b"something else")
    with pytest.raises(ValueError, match="no file of an interrupted calibration"):
        moe_ext.calibrate(model, five_batches(), progress=False, resume=state)
    with pytest.raises(TypeError, match="does not go on from half its Gram matrices"):
        moe_ext.calibrate(model, five_batches(), progress=False, resume=state, channels="gram")


def test_a_second_ctrl_c_stops_at_once() -> None:
    with interrupted.stopping_between_batches(True) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_bar_says_how_much_there_is_and_what_became_of_rows(
    tiny_mixtral: MixtralFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows = tiny_mixtral(), {"x": ["abc", 3, "abcd"]}
    moe_ext.calibrate(model, five_batches())
    assert "5/5" in capsys.readouterr().err
    tokenizer = letter_tokenizer(bos=False)
    data = moe_ext.data.batches(rows, tokenizer, tokens=6, batch_size=1, skip_bad_rows=True, ahead=0)
    moe_ext.calibrate(model, data)
    said = capsys.readouterr().err
    assert "6.00/6.00" in said
    assert "1 bad rows, waiting" in said
