"""The transformers model inside of what is put around it: torch.compile, DistributedDataParallel, PEFT."""

from typing import Any


def unwrapped(model: Any) -> Any:
    """The model that a compiled, data-parallel or PEFT model runs, weights and adapters its own; any other as it is.

    Raises:
        ValueError: a PEFT model with learned prompts, which its base model does not have.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def unwrapped_to_change(model: Any, job: str) -> Any:
    """:func:`unwrapped`, for a job that replaces weights, of which a wrapper may keep its own account.

    Raises:
        ValueError: there is such a wrapper; says what to do instead.
    """
    inner = model
    while (deeper := _inside(inner)) is not None:
        names = _class_names(inner)
        if "PeftModel" in names:
            raise ValueError(
                f"{type(inner).__name__}: adapters are for the weights as they are; {job} "
                "model.merge_and_unload() instead"
            )
        if names & _DATA_PARALLEL:
            raise ValueError(
                f"{type(inner).__name__} keeps account of the weights as they are; {job} model.module and wrap it anew"
            )
        inner = deeper
    return inner


_DATA_PARALLEL = {"DistributedDataParallel", "DataParallel"}


def _class_names(model: Any) -> set[str]:
    return {cls.__name__ for cls in type(model).__mro__}


def _inside(model: Any) -> Any | None:
    """What a wrapper holds; None for anything else."""
    names = _class_names(model)
    if "OptimizedModule" in names:
        return model._orig_mod
    if names & _DATA_PARALLEL:
        return model.module
    if "PeftModel" in names:
        config = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{type(model).__name__} has learned prompts, without which its base model is another one; "
                "moe_ext takes PEFT models whose adapters are in the layers"
            )
        return model.get_base_model()
    return None
