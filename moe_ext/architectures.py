"""What differs between model families: where the MoE blocks are, and which config fields count experts.

One small record per ``config.model_type``. Everything else in the package works on the :class:`MoeBlock` list that
:func:`moe_blocks` returns, in layer order.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import _default_apply_gate

# transformers' names (config.hidden_act) of the activations that the operators compute.
ACTIVATION_OF_HIDDEN_ACT = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Family:
    """How one model family names the parts of its MoE layers.

    Attributes:
        block: class name of the MoE block.
        router: attribute of the block that holds the router (``weight`` (E, H); returns logits, weights, experts).
        experts: attribute of the block that holds the experts (``gate_up_proj`` (E, 2I, H), ``down_proj`` (E, H, I)).
        num_experts_fields: config fields that hold the number of experts.
        gate: what the routing weight g_e is, as written into statistics files.
    """

    block: str
    router: str
    experts: str
    num_experts_fields: tuple[str, ...]
    gate: str


FAMILIES = {
    "mixtral": Family(
        block="MixtralSparseMoeBlock",
        router="gate",
        experts="experts",
        num_experts_fields=("num_local_experts",),
        gate="softmax over the selected logits",
    ),
}


@dataclass(frozen=True)
class MoeBlock:
    """One MoE layer of a live model; ``name`` is the block's module name, such as ``model.layers.0.mlp``."""

    name: str
    router: nn.Module
    experts: nn.Module

    @property
    def num_experts(self) -> int:
        return int(self.experts.num_experts)  # type: ignore[arg-type]

    @property
    def top_k(self) -> int:
        return int(self.router.top_k)  # type: ignore[arg-type]


def family_of(model: PreTrainedModel) -> Family:
    """The family record of a model.

    Raises:
        TypeError: not a transformers model.
        ValueError: its model type has no MoE family here.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def moe_blocks(model: PreTrainedModel) -> list[MoeBlock]:
    """The MoE layers of a model in layer order.

    Raises:
        TypeError, ValueError: as :func:`family_of`; ValueError too if the number of MoE layers is not the config's.
    """
    family = family_of(model)
    blocks = [
        MoeBlock(name, getattr(module, family.router), getattr(module, family.experts))
        for name, module in model.named_modules()
        # By name and with bases: wrappers such as FSDP make a subclass of the block's class.
        if family.block in (cls.__name__ for cls in type(module).__mro__)
    ]
    if len(blocks) != model.config.num_hidden_layers:
        raise ValueError(
            f"{type(model).__name__} has {len(blocks)} MoE layers ({family.block}); "
            f"its config says {model.config.num_hidden_layers}"
        )
    return blocks


def check_layout(block: MoeBlock) -> None:
    """Checks that a block's router and experts are plain weights in the layout of the operators.

    Raises:
        ValueError: what is different, with the layer's name.
    """
    _check_parameters(block.name, block.router, {"weight"}, block.num_experts)
    check_experts(block.name, block.experts)


def check_experts(name: str, experts: nn.Module) -> None:
    """Checks that an experts module computes ``down (act(gate x) * (up x))`` on plain (E, 2I, H) and (E, H, I) weights.

    Raises:
        ValueError: what is different, beginning with ``name``.
    """
    flags = {
        "is_transposed": "transposed weights",
        "has_bias": "biases",
        "has_post_expert_norm": "a norm after each expert",
        "_is_expert_parallel": "expert parallelism",
    }
    found = [reason for flag, reason in flags.items() if getattr(experts, flag, False)]
    if not getattr(experts, "has_gate", True):
        found.append("no gate projection")
    if not getattr(experts, "is_concatenated", True):
        found.append("interleaved gate and up rows")
    if getattr(type(experts), "_apply_gate", None) is not _default_apply_gate:
        found.append("its own gating function")
    if found:
        raise ValueError(f"{name}: {type(experts).__name__} has {' and '.join(found)}, which moe_ext does not support")
    _check_parameters(name, experts, {"gate_up_proj", "down_proj"}, int(experts.num_experts))  # type: ignore[arg-type]


def _check_parameters(name: str, module: nn.Module, expected: set[str], num_experts: int) -> None:
    parameters = dict(module.named_parameters())
    # A parametrized weight shows up under other names, a quantised one or an adapter as further or other types.
    if set(parameters) != expected or any(type(parameter) is not nn.Parameter for parameter in parameters.values()):
        raise ValueError(
            f"{name}: {type(module).__name__} has parameters {sorted(parameters)}; expected plain {sorted(expected)}"
        )
    for key, parameter in parameters.items():
        if parameter.shape[0] != num_experts:
            raise ValueError(f"{name}: {key} has {parameter.shape[0]} experts; expected {num_experts}")
        if parameter.device.type == "meta":
            raise ValueError(f"{name}: {key} is on the meta device; load the model's weights into memory")


def activation_of(config: Any) -> str:
    """The operators' name of a config's activation.

    Raises:
        ValueError: the operators do not compute that activation.
    """
    activation = ACTIVATION_OF_HIDDEN_ACT.get(config.hidden_act)
    if activation is None:
        raise ValueError(
            f"hidden_act {config.hidden_act!r} is not supported; supported: {', '.join(ACTIVATION_OF_HIDDEN_ACT)}"
        )
    return activation
