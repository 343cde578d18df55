"""Tasks through lm-eval, offline: a local task on the demo model gives lm-eval's own numbers where nothing differs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_ext
from moe_ext.checkpoints.load_save import load_checkpoint, save_checkpoint
from tests.support.command_line import moe
from tests.support.paths import DEMO_MODEL

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'moe_ext[eval]'")

from lm_eval.api import registry

from moe_ext.evaluation.harness import TASKS, PatchedModel, evaluate_tasks

LAYERS = tuple(f"model.layers.{layer}.mlp" for layer in range(4))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a multiple-choice task, a perplexity task and two in which the model writes, on a little held-out
    text, all local."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = (DEMO_MODEL / "held_out" / "english.txt").read_text()[:6000].split(". ")
    lines = [line.replace("\n", " ").strip() for line in lines if len(line) > 30][:12]
    rows = [
        {"text": line[:-12], "choices": [line[-12:], lines[index - 1][-12:]], "answer": 0, "whole": line}
        for index, line in enumerate(lines)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/rows.jsonl\ntest_split: test\n"
    (folder / "endings.yaml").write_text(
        f"task: local_endings\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{text}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (folder / "prose.yaml").write_text(
        f"task: local_prose\n{data}output_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: '{{whole}}'\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    writing = (
        f"{data}output_type: generate_until\ndoc_to_text: '{{{{text}}}}'\ndoc_to_target: '{{{{whole}}}}'\n"
        "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 8\n  do_sample: false\n"
        # A score that moves with every letter that the model writes.
        "metric_list:\n  - metric: ter\n"
    )
    (folder / "writing.yaml").write_text(f"task: local_writing\n{writing}")
    (folder / "program.yaml").write_text(f"task: local_program\nunsafe_code: true\n{writing}")
    return folder


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo model with thresholds in its config, in float32."""
    model, tokenizer = load_checkpoint(DEMO_MODEL, dtype="float32")
    moe_ext.patch(model, skip=torch.full((4, 1), 0.8))
    folder = tmp_path_factory.mktemp("checkpoint") / "skipping"
    save_checkpoint(model, tokenizer, folder)
    return str(folder)


def numbers(result: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Metrics by "task metric"."""
    return {
        f"{task} {metric}": value
        for task, metrics in result.items()
        for metric, value in metrics.items()
        if isinstance(value, float) and not math.isnan(value)
    }


def test_without_skipping_the_numbers_are_those_of_lm_evals_own_model(tasks: Path, skipping: str) -> None:
    names = ["local_endings", "local_prose"]
    ours = numbers(evaluate_tasks(skipping, names, include=tasks, skip="none"))
    expected = numbers(evaluate_tasks(skipping, names, include=tasks, model="hf"))
    assert numbers(evaluate_tasks(skipping, names, include=tasks, stock=True)) == expected
    assert {"local_endings acc,none", "local_prose word_perplexity,none"} <= set(expected)
    assert ours == pytest.approx(expected, rel=1e-4)  # float32 sums in another order; perplexity is an exponential
    assert 0 < expected["local_endings acc,none"] <= 1


def test_skipping_and_plans_reach_the_model(tasks: Path, skipping: str, tmp_path: Path) -> None:
    names = ["local_prose"]
    whole = numbers(evaluate_tasks(skipping, names, include=tasks, skip="none"))
    skipped = numbers(evaluate_tasks(skipping, names, include=tasks))
    assert skipped != whole
    plan = moe_ext.PruningPlan("mixtral", 8, 2, LAYERS, (tuple(range(6)),) * 4)
    plan.save(tmp_path / "plan.json")
    planned = numbers(evaluate_tasks(skipping, names, include=tasks, skip="none", plan=str(tmp_path / "plan.json")))
    model, tokenizer = load_checkpoint(skipping)
    save_checkpoint(moe_ext.prune(model, plan), tokenizer, tmp_path / "pruned")
    pruned = numbers(evaluate_tasks(str(tmp_path / "pruned"), names, include=tasks, model="hf"))
    assert planned == pytest.approx(pruned, rel=1e-4)
    assert planned != pytest.approx(whole, rel=1e-2)


def test_the_command_prints_lm_evals_metrics(tasks: Path, skipping: str) -> None:
    arguments = ("eval", skipping, "--tasks", "local_endings", "--include", tasks, "--no-skip", "--json")
    result = moe(*arguments)
    assert result.returncode == 0, result.stderr
    got = numbers(json.loads(result.stdout)["tasks"])
    assert got == numbers(evaluate_tasks(skipping, ["local_endings"], include=tasks, skip="none"))


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "moe_ext.evaluation.harness"],
        pytest.param(
            [str(Path(sys.executable).with_name("lm_eval"))],
            marks=pytest.mark.skipif(
                not hasattr(registry, "import_plugins"), reason="this lm-eval does not look for models elsewhere"
            ),
        ),
    ],
    ids=["moe_ext.evaluation.harness", "lm_eval"],
)
def test_lm_evals_own_command_line_knows_the_model(command: list[str], tasks: Path, skipping: str) -> None:
    arguments = ["--model", "moe_ext", "--model_args", f"pretrained={skipping},skip=auto", "--tasks", "local_endings"]
    environment = {**os.environ, "COLUMNS": "200"}
    result = subprocess.run(
        [*command, *arguments, "--include_path", str(tasks), "--device", "cpu", "--limit", "2"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "local_endings" in result.stdout


def test_the_entry_point_leads_lm_evals_registry_to_the_model() -> None:
    # What lm-eval after 0.4.13 does with entry points, in a process that has not imported the model.
    code = """
from importlib.metadata import entry_points
from lm_eval.api.registry import get_model, model_registry
(entry,) = entry_points(group="lm_eval.models", name="moe_ext")
model_registry.register("moe_ext", target=entry.value)
print(get_model("moe_ext"))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "<class 'moe_ext.evaluation.harness.PatchedModel'>\n", result.stderr[-2000:]


def test_a_model_writes_what_it_writes_in_lm_evals_own(tasks: Path, skipping: str) -> None:
    names = ["local_writing"]
    ours = numbers(evaluate_tasks(skipping, names, include=tasks, skip="none"))
    assert ours == numbers(evaluate_tasks(skipping, names, include=tasks, model="hf"))
    assert numbers(evaluate_tasks(skipping, names, include=tasks)) != ours


def test_tasks_that_run_programs_of_the_model_need_leave(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    options: dict[str, Any] = {"include": tasks, "limit": 1}
    with pytest.raises(ValueError, match="tasks: one of local_program runs programs that the model writes"):
        evaluate_tasks(str(DEMO_MODEL), ["local_program"], **options)
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")  # and is taken away again
    assert numbers(evaluate_tasks(str(DEMO_MODEL), ["local_program"], unsafe_code=True, **options))


MULTIPLE_CHOICE = ["arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande"]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("naee_zero_shot", MULTIPLE_CHOICE),
        ("expert_scoring_multiple_choice", MULTIPLE_CHOICE),
        ("generative", ["gsm8k", "humaneval"]),
    ],
)
def test_the_groups_name_tasks_that_lm_eval_knows(group: str, expected: list[str]) -> None:
    from lm_eval.tasks import TaskManager

    lines = (TASKS / f"{group}.yaml").read_text().splitlines()
    names = [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
    assert names == expected
    manager = TaskManager(include_path=[str(TASKS)])
    assert set(manager.match_tasks([group, *names])) == {group, *names}


def test_tokens_that_the_model_does_not_have_are_refused() -> None:
    model = PatchedModel(str(DEMO_MODEL), device="cpu")
    beyond = torch.tensor([[1, 2, model.model.config.vocab_size]])
    with pytest.raises(ValueError, match="tasks: expected tokens from 0 and below the model's vocabulary size"):
        model._model_call(beyond)
    with pytest.raises(ValueError, match="tasks: expected tokens from 0"):
        model._model_generate(beyond, max_length=8, stop=[])


def test_options_that_do_not_fit_are_refused(tasks: Path) -> None:
    with pytest.raises(ValueError, match="tasks: lm-eval knows no nonsense"):
        evaluate_tasks(str(DEMO_MODEL), ["nonsense"], include=tasks)
    with pytest.raises(ValueError, match="skip: expected one of auto, none, got 'half'"):
        PatchedModel(str(DEMO_MODEL), skip="half")
