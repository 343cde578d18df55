"""Records of model families: what pruning has to leave their routers.

One small record per ``model_type`` of the text model. Records are data: what is done with them is in
:mod:`moe_ext.models.blocks`.
"""

from dataclasses import dataclass

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
    """What pruning has to leave a family's routers. How they choose is found by numbers
    (:mod:`moe_ext.models.router_formula`); where MoE layers are, and what in them counts experts, is found in the model
    (:mod:`moe_ext.models.boundary`, :mod:`moe_ext.models.counted`).

    Attributes:
        groups_field: config field of the number of expert groups, contiguous and of equal size. A token's experts come
            from ``config.topk_group`` of them.
        groups_when: config field and the value with which groups are used; None: always.
        fewest_per_group: experts that a group needs at least, whatever K is.
    """

    groups_field: str | None = None
    groups_when: tuple[str, str] | None = None
    fewest_per_group: int = 1


_IN_GROUPS = Family("n_group", fewest_per_group=2)  # a group is ranked by its two best

FAMILIES = {
    "mixtral": Family(),
    "qwen2_moe": Family(),
    "qwen3_moe": Family(),
    "qwen3_vl_moe_text": Family(),
    "olmoe": Family(),
    "deepseek_v2": Family("n_group", groups_when=("topk_method", "group_limited_greedy")),
    "deepseek_v3": _IN_GROUPS,
    "glm4_moe": _IN_GROUPS,
    "ernie4_5_moe": Family(),
    "phimoe": Family(),
    "granitemoe": Family(),
    "minimax": Family(),
    "jamba": Family(fewest_per_group=2),  # stock Jamba builds a plain MLP for one expert
    "gpt_oss": Family(),
}
