"""Records of model families: where a family's MoE blocks are, how they route, which config fields count experts.

One small record per ``model_type`` of the text model. Records are data: what is done with them is in
:mod:`moe_ext.models.blocks`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# Names under which the families' configs count experts; the generic path looks for them.
NUM_EXPERTS_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

# Names under which they count layers for multi-token prediction, or say that there are some.
FURTHER_LAYERS_FIELDS = (
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
    "num_mtp_layers",
    "num_mtp_modules",
    "use_mtp",
)


@dataclass(frozen=True)
class Family:
    """How one model family names and computes the parts of its MoE layers.

    Attributes:
        block: class name of the MoE block. Shared experts live in it beside the routed ones and are never touched.
        num_experts_field: config field that holds the number of experts; None if no field of a known name does.
        router: attribute of the block that holds the router (returns logits, weights (T, K), experts (T, K)).
        router_parameters: per-expert parameters and buffers of the router, with the dimension that counts experts; a
            correction bias is one of them. None: every tensor of the router, told by its shape.
        experts: attribute of the block that holds the experts.
        score: what a softmax or sigmoid router computes from the logits; "own": something else.
        renormalise: whether the selected scores are scaled to sum to 1; a name is the config field that says so.
        selects_by_score: whether the K largest scores are selected, in that order. With a softmax score this is what
            the ``route`` operator computes; False for groups and correction biases.
        groups_field: config field of the number of expert groups, contiguous and of equal size. A token's experts come
            from ``config.topk_group`` of them.
        groups_when: config field and the value with which groups are used; None: always.
        fewest_per_group: experts that a group needs at least, whatever K is.
        every_layer: whether every decoder layer has experts.
    """

    block: str
    num_experts_field: str | None
    router: str = "gate"
    router_parameters: Mapping[str, int] | None = field(default_factory=lambda: {"weight": 0})
    experts: str = "experts"
    score: Literal["softmax", "sigmoid", "own"] = "softmax"
    renormalise: bool | str = True
    selects_by_score: bool = True
    groups_field: str | None = None
    groups_when: tuple[str, str] | None = None
    fewest_per_group: int = 1
    every_layer: bool = True

    @property
    def fused(self) -> bool:
        """Whether the ``route`` operator computes this family's routing."""
        return self.score == "softmax" and self.selects_by_score

    @property
    def gate(self) -> str:
        """What the routing weight g_e is, as written into statistics files."""
        if self.fused:
            return f"softmax over {'the selected' if self.renormalise else 'all'} logits"
        if self.score == "own":
            return "weights as the family's router gives them"
        return f"{self.score} scores{', renormalised' if self.renormalise else ''}, as the family's router gives them"


_CORRECTED = {"weight": 0, "e_score_correction_bias": 0}

FAMILIES = {
    "mixtral": Family("MixtralSparseMoeBlock", "num_local_experts"),
    "qwen2_moe": Family("Qwen2MoeSparseMoeBlock", "num_experts", renormalise="norm_topk_prob", every_layer=False),
    "qwen3_moe": Family("Qwen3MoeSparseMoeBlock", "num_experts", renormalise="norm_topk_prob", every_layer=False),
    "qwen3_vl_moe_text": Family("Qwen3VLMoeTextSparseMoeBlock", "num_experts", every_layer=False),
    "olmoe": Family("OlmoeSparseMoeBlock", "num_experts", renormalise="norm_topk_prob"),
    "deepseek_v2": Family(
        "DeepseekV2Moe",
        "n_routed_experts",
        renormalise=False,
        selects_by_score=False,
        groups_field="n_group",
        groups_when=("topk_method", "group_limited_greedy"),
        every_layer=False,
    ),
    "deepseek_v3": Family(
        "DeepseekV3MoE",
        "n_routed_experts",
        router_parameters=_CORRECTED,
        score="sigmoid",
        renormalise="norm_topk_prob",
        selects_by_score=False,
        groups_field="n_group",
        fewest_per_group=2,  # a group is ranked by its two best
        every_layer=False,
    ),
    "glm4_moe": Family(
        "Glm4MoeMoE",
        "n_routed_experts",
        router_parameters=_CORRECTED,
        score="sigmoid",
        renormalise="norm_topk_prob",
        selects_by_score=False,
        groups_field="n_group",
        fewest_per_group=2,  # a group is ranked by its two best
        every_layer=False,
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeSparseMoeBlock",
        "moe_num_experts",
        router_parameters={"weight": 0, "moe_statics.e_score_correction_bias": 1},
        selects_by_score=False,
        every_layer=False,
    ),
    "phimoe": Family(
        "PhimoeSparseMoeBlock",
        "num_local_experts",
        router="router",
        score="own",  # sparsemixer
        renormalise=False,
        selects_by_score=False,
    ),
    "granitemoe": Family("GraniteMoeMoE", "num_local_experts", router="router"),
    "minimax": Family("MiniMaxSparseMoeBlock", "num_local_experts"),
    "jamba": Family(
        "JambaSparseMoeBlock",
        "num_experts",
        router="router",
        renormalise=False,
        fewest_per_group=2,  # stock Jamba builds a plain MLP for one expert
        every_layer=False,
    ),
    "gpt_oss": Family("GptOssMLP", "num_local_experts", router="router", router_parameters={"weight": 0, "bias": 0}),
}
