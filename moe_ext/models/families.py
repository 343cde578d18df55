"""Records of model families: how their routers choose.

One small record per ``model_type`` of the text model. Records are data: what is done with them is in
:mod:`moe_ext.models.blocks`.
"""

from dataclasses import dataclass
from typing import Literal

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
    """How one model family's routers choose. Where its MoE layers are, and what in them counts experts, is found in the
    model (:mod:`moe_ext.models.boundary`, :mod:`moe_ext.models.counted`).

    Attributes:
        score: what a softmax or sigmoid router computes from the logits; "own": something else.
        renormalise: whether the selected scores are scaled to sum to 1; a name is the config field that says so.
        selects_by_score: whether the K largest scores are selected, in that order. With a softmax score this is what
            the ``route`` operator computes; False for groups and correction biases.
        groups_field: config field of the number of expert groups, contiguous and of equal size. A token's experts come
            from ``config.topk_group`` of them.
        groups_when: config field and the value with which groups are used; None: always.
        fewest_per_group: experts that a group needs at least, whatever K is.
    """

    score: Literal["softmax", "sigmoid", "own"] = "softmax"
    renormalise: bool | str = True
    selects_by_score: bool = True
    groups_field: str | None = None
    groups_when: tuple[str, str] | None = None
    fewest_per_group: int = 1

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


_BY_CORRECTED_SCORES_IN_GROUPS = Family(
    score="sigmoid",
    renormalise="norm_topk_prob",
    selects_by_score=False,
    groups_field="n_group",
    fewest_per_group=2,  # a group is ranked by its two best
)

FAMILIES = {
    "mixtral": Family(),
    "qwen2_moe": Family(renormalise="norm_topk_prob"),
    "qwen3_moe": Family(renormalise="norm_topk_prob"),
    "qwen3_vl_moe_text": Family(),
    "olmoe": Family(renormalise="norm_topk_prob"),
    "deepseek_v2": Family(
        renormalise=False,
        selects_by_score=False,
        groups_field="n_group",
        groups_when=("topk_method", "group_limited_greedy"),
    ),
    "deepseek_v3": _BY_CORRECTED_SCORES_IN_GROUPS,
    "glm4_moe": _BY_CORRECTED_SCORES_IN_GROUPS,
    "ernie4_5_moe": Family(selects_by_score=False),
    "phimoe": Family(score="own", renormalise=False, selects_by_score=False),  # sparsemixer
    "granitemoe": Family(),
    "minimax": Family(),
    # Stock Jamba builds a plain MLP for one expert.
    "jamba": Family(renormalise=False, fewest_per_group=2),
    "gpt_oss": Family(),
}
