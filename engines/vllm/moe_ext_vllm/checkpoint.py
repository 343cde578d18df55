"""What moe_ext wrote into a checkpoint's config, as far as it concerns an engine."""

from dataclasses import dataclass
from typing import Any

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Fields of configs that say how many experts a layer has."""
WIDTHS = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
"""Fields that say how wide they are."""
_OF_EXPERTS = {*COUNTS, *WIDTHS, "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"}


@dataclass(frozen=True)
class Checkpoint:
    """What a config says beside the model itself.

    Attributes:
        thresholds: decoder layer to its K - 1 skip thresholds; empty if nothing is skipped.
        scale: what becomes of the weights of a token's kept experts: "kept", they sum to what all K summed to; "none",
            they stay; K2, they are softmax values over the sum of the K2 largest.
        unequal: fields of experts in which decoder layers differ.
        novices: whether means stand in the place of experts.
        own_counts: whether layers have different numbers of experts in a family whose config has no place for that.
    """

    thresholds: dict[int, tuple[float, ...]]
    scale: str | int = "kept"
    unequal: frozenset[str] = frozenset()
    novices: bool = False
    own_counts: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to do for it."""
        return not (self.changes_routing or self.unequal or self.novices or self.own_counts)

    @property
    def changes_routing(self) -> bool:
        """Whether tokens have other experts or other weights than the routers choose."""
        return bool(self.thresholds) or isinstance(self.scale, int)


def read(model_config: Any) -> Checkpoint:
    """What the config of a ``vllm.config.ModelConfig`` says.

    Raises:
        ValueError: something under ``moe_ext`` that has no meaning, or not for this model; it is named.
    """
    if getattr(model_config, "runner_type", None) == "draft":
        # It guesses ahead for another model, which decides what is said: it may run without skipping.
        return Checkpoint({})
    text, whole = model_config.hf_text_config, model_config.hf_config
    section = getattr(text, "moe_ext", None)
    if section is None:
        section = getattr(whole, "moe_ext", None)  # where early versions wrote it
    if section is None:
        section = {}
    if not isinstance(section, dict):
        raise ValueError(f"config.moe_ext is {_shown(section)}; expected a dict")
    layers = int(text.num_hidden_layers)
    thresholds: dict[int, tuple[float, ...]] = {}
    betas = getattr(text, "betas", getattr(whole, "betas", None))
    if "skip_thresholds" in section:
        thresholds = _thresholds(section["skip_thresholds"], layers)
    elif isinstance(betas, dict):  # of NAEE's published code
        if {str(key) for key in betas} != {str(layer) for layer in range(layers)}:
            raise ValueError(
                f"config.betas has the keys {_shown(list(betas))}, which do not say to which of the {layers} decoder "
                "layers they belong. moe-ext skip writes thresholds by decoder layer."
            )
        thresholds = {int(key): _row("betas", [value]) for key, value in betas.items()}
    scale = section.get("renormalise", "kept")
    if not (scale in ("kept", "none") if isinstance(scale, str) else type(scale) is int and scale > 0):
        raise ValueError(f"config.moe_ext.renormalise is {_shown(scale)}; expected 'kept', 'none' or a number")
    differing = frozenset(getattr(text, "per_layer_attributes", None) or ())
    return Checkpoint(
        thresholds,
        scale,
        # Layers that differ in anything else are not moe_ext's, and vLLM's own affair.
        unequal=differing if differing <= _OF_EXPERTS else frozenset(),
        novices=section.get("experts_left") is not None,
        own_counts=section.get("num_experts") is not None,
    )


def _thresholds(stored: object, layers: int) -> dict[int, tuple[float, ...]]:
    name = "moe_ext.skip_thresholds"
    if isinstance(stored, list):  # an older form: of the MoE layers, in their order
        if len(stored) != layers:
            raise ValueError(
                f"config.{name} has {len(stored)} rows and does not say to which of the {layers} decoder layers they "
                "belong. moe-ext skip writes thresholds by decoder layer."
            )
        return {layer: _row(name, row) for layer, row in enumerate(stored)}
    if not isinstance(stored, dict) or not all(str(key).isdecimal() and int(key) < layers for key in stored):
        raise ValueError(f"config.{name} is {_shown(stored)}; expected rows by decoder layer, below {layers}")
    return {int(key): _row(name, row) for key, row in stored.items()}


def _row(name: str, row: object) -> tuple[float, ...]:
    if not isinstance(row, list) or not all(type(value) in (int, float) and 0 <= value <= 1 for value in row):
        raise ValueError(f"config.{name} holds {_shown(row)}; expected numbers from 0 to 1")
    return tuple(float(value) for value in row)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
