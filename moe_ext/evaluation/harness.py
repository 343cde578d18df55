"""lm-eval's model ``moe_ext``: its ``hf`` model, patched, with pruning and skipping; ``pip install 'moe_ext[eval]'``.

lm-eval up to 0.4.13 looks for models in its own list only, and importing this module registers ours; later ones read
the entry point that this package declares. ``moe-ext eval --tasks`` works with all of them. lm-eval's own command line
with the model known:

    python -m moe_ext.evaluation.harness --tasks boolq \\
        --model moe_ext --model_args pretrained=folder,skip=auto,plan=plan.json
"""

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from torch import Tensor

from moe_ext.checkpoints.finite import check_finite
from moe_ext.checkpoints.load_save import from_pretrained
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.pruning.prune import prune
from moe_ext.runtime.batches import check_tokens, vocabulary_of
from moe_ext.runtime.patching import patch

try:
    import lm_eval
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError("evaluation on tasks needs lm-eval: pip install 'moe_ext[eval]'") from error


TASKS = Path(__file__).parent / "tasks"
"""Groups of tasks: ``naee_zero_shot`` and ``expert_scoring_multiple_choice``, the papers' lists; ``generative``."""

SKIPS = ("auto", "none")


@register_model("moe_ext")
class PatchedModel(HFLM):
    """lm-eval's ``hf`` model with moe_ext's experts; checkpoints whose layers differ load, too.

    Args:
        pretrained: a checkpoint folder, or a name on the Hub.
        skip: "auto" applies the skip thresholds that the checkpoint's config holds, if any; "none" skips nothing.
        plan: a plan file; the model is pruned by it once it is loaded.
        strict: as for :func:`moe_ext.patch`.
        stock: whether to run transformers' own code, on what is loaded with the same care.
        allow_missing: as for :func:`moe_ext.from_pretrained`, which loads the model.
        **options: those of lm-eval's ``hf`` model.

    Raises:
        CheckpointError: the checkpoint is not what the model needs.
        ValueError: another ``skip``, a live model as ``pretrained``, or as :func:`moe_ext.prune` and
            :func:`moe_ext.patch`.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        skip: str = "auto",
        plan: str | None = None,
        strict: bool = True,
        stock: bool = False,
        allow_missing: bool = False,
        **options: Any,
    ) -> None:
        if skip not in SKIPS:
            raise ValueError(f"skip: expected one of {', '.join(SKIPS)}, got {skip!r}")
        if not isinstance(pretrained, str):
            raise ValueError(f"pretrained: expected a folder or a name on the Hub, got {type(pretrained).__name__}")
        self._skip: Literal["config"] | None = "config" if skip == "auto" else None
        self._strict, self._stock, self._allow_missing = strict, stock, allow_missing
        self._plan = None if plan is None else PruningPlan.load(plan)
        super().__init__(pretrained, **options)

    def _create_model(self, *args: Any, **options: Any) -> None:
        stock: Any = self.AUTO_MODEL_CLASS  # type: ignore[has-type]
        # The class that the checkpoint names, as every job of this package: layers have one name.
        load = partial(from_pretrained, allow_missing=self._allow_missing)
        self.AUTO_MODEL_CLASS = SimpleNamespace(from_pretrained=load)
        try:
            super()._create_model(*args, **options)
        finally:
            self.AUTO_MODEL_CLASS = stock
        check_finite(self._model.name_or_path, self._model)
        if self._plan is not None:
            prune(self._model, self._plan)
        if not self._stock:
            patch(self._model, skip=self._skip, strict=self._strict)

    # On a GPU the embedding's own check would take the whole CUDA context down.
    def _model_call(self, inps: Tensor, *args: Any, **options: Any) -> Any:
        check_tokens("tasks", inps, vocabulary_of(self._model))
        return super()._model_call(inps, *args, **options)

    def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Any:
        check_tokens("tasks", context, vocabulary_of(self._model))
        return super()._model_generate(context, *args, **options)


def evaluate_tasks(
    checkpoint: str,
    tasks: list[str],
    *,
    model: Literal["moe_ext", "hf"] = "moe_ext",
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str = "auto",
    unsafe_code: bool = False,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Runs lm-eval's tasks.

    Args:
        checkpoint: a folder, or a name on the Hub.
        tasks: names of tasks or groups: lm-eval's, those in ``TASKS`` and those in ``include``.
        model: "moe_ext", or lm-eval's own "hf".
        include: a folder of further task files.
        limit: documents of each task, the first ones; None: all.
        unsafe_code: whether tasks may run programs that the model writes, on this machine and as this user, such as
            humaneval does.
        **options: of the model, such as ``skip`` and ``plan``.

    Returns:
        Task name to lm-eval's metrics of it.

    Raises:
        ValueError: an unknown task, or one that runs such programs without leave.
    """
    manager = TaskManager(include_path=[str(folder) for folder in (TASKS, include) if folder is not None])
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise ValueError(f"tasks: lm-eval knows no {', '.join(unknown)}")
    if unsafe_code:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")  # which the metric of such tasks asks for as well
    try:
        result = lm_eval.simple_evaluate(
            model=model,
            model_args={"pretrained": checkpoint, "dtype": dtype, **options},
            tasks=tasks,
            limit=limit,
            batch_size=batch_size,
            device=device,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
            confirm_run_unsafe_code=unsafe_code,
        )
    except ValueError as error:
        if unsafe_code or "confirm_run_unsafe_code" not in str(error):
            raise
        raise ValueError(
            f"tasks: one of {', '.join(tasks)} runs programs that the model writes, on this machine: unsafe_code=True "
            "(--allow-unsafe-code) lets it"
        ) from error
    found: dict[str, dict[str, Any]] = result["results"]
    return found


if __name__ == "__main__":
    # This file runs as __main__: the class that lm-eval knows is this one.
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
