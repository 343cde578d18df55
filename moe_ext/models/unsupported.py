"""Why a model has no MoE layers that are supported, and what to do."""

from transformers import PreTrainedModel

_BY_CAPACITY = (
    "tokens beyond an expert's capacity pass it by, so that what its experts give a token depends on the others of the "
    "batch, and they serve an encoder, too, which no text of a decoder calibrates"
)
# By model type. What is not here and has experts all the same is named by its module.
_REASONS = {
    "doge": "its experts are rows of two embedding tables, found by pairs of keys: none can go without all that share "
    "a key with it",
    "jetmoe": "its layers have experts of attention heads, too, with a router of their own, and one field of its "
    "config counts both, so that neither can go without the other",
    "nllb-moe": _BY_CAPACITY,
    "switch_transformers": _BY_CAPACITY,
}
# Those of moe_ext.models.only_pruned.
_PRUNED_ALL_THE_SAME = {
    "dbrx": "its experts lie in flat matrices, gate and up in two of them, which is not the operators' layout, and its "
    "own code shows no outputs of single experts",
}


def why_unsupported(model: PreTrainedModel) -> str:
    """In words, for the refusal of a model in which no MoE layers were found, or none that are more than pruned."""
    model_type = model.config.get_text_config(decoder=True).model_type
    said = (
        f"{type(model).__name__} has no MoE layers that are supported: no module of it goes through transformers' "
        f"experts interface (model type {model_type!r})"
    )
    if model_type in _PRUNED_ALL_THE_SAME:
        return (
            f"{said}; {_PRUNED_ALL_THE_SAME[model_type]}. Whole experts can go, as many in every layer: prune and "
            "prune_checkpoint take a plan written by hand or made of moe_ext.aimer's scores, which need no calibration"
        )
    experts = _experts_of_its_own(model)
    if model_type in _REASONS and experts is not None:
        return (
            f"{said}; {_REASONS[model_type]}. Quantise it instead, or take a model of another family "
            "(docs/support.md says which are supported)"
        )
    if experts is not None:
        name, kind = experts
        return f"{said}; its experts, {name}, are a {kind} with code of their own, which is not known here"
    return said


def _experts_of_its_own(model: PreTrainedModel) -> tuple[str, str] | None:
    """The name and class of what in a model seems to be experts all the same."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "expert" in kind.lower() or kind.endswith("MoE") or name.rpartition(".")[2] == "experts":
            return name, kind
    return None
