"""Tiny random models of every family in ``moe_ext.models.families.FAMILIES``, from their real config classes."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PreTrainedModel

from moe_ext.decision.kept_channels import KeptChannels
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.models.blocks import input_device, model_type_of, moe_blocks, prunable_blocks
from moe_ext.models.expert_width import width_of
from tests.support.reference import DEVICES, ExpertsCase

# Fields that the families share; a config without one of them takes its own instead.
SHARED = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # large enough that routing weights and activations differ clearly
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}

FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 9,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "olmoe": ("Olmoe", {"num_experts": 12, "num_experts_per_tok": 8}),
    "deepseek_v2": ("DeepseekV2", {**MLA, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3", {**MLA, "head_dim": 4, "num_nextn_predict_layers": 1}),
    "glm4_moe": (
        "Glm4Moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 2,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    ),
    # The default noise bound of 0.01 masks nearly every other expert: all weights would be near 1.
    "phimoe": ("Phimoe", {"num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.3}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 8, "num_experts_per_tok": 3}),
    "minimax": ("MiniMax", {"num_local_experts": 8, "num_experts_per_tok": 2, "block_size": 16}),
    "jamba": (
        "Jamba",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "num_experts_per_tok": 4}),
    "qwen3_vl_moe_text": (
        "Qwen3VLMoe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    ),
}
UNRECORDED: dict[str, tuple[str, dict[str, Any]]] = {
    "flex_olmo": ("FlexOlmo", {"num_experts": 8, "num_experts_per_tok": 3}),
    "minimax_m2": ("MiniMaxM2", {"num_local_experts": 8, "num_experts_per_tok": 3}),  # the block holds the bias
    "dots1": ("Dots1", {**FIELDS["glm4_moe"][1], "n_shared_experts": 1}),
    # The router is given the block's bias, and holds a Linear.
    "afmoe": (
        "Afmoe",
        {"num_experts": 8, "num_experts_per_tok": 3, "num_dense_layers": 1, "moe_intermediate_size": 24},
    ),
}
"""Families without a record in ``FAMILIES``: the generic path."""

KEEP = {"qwen2_moe": 6, "qwen3_moe": 10, "olmoe": 9, "deepseek_v2": 8, "deepseek_v3": 8, "glm4_moe": 6, "dots1": 6}
"""Experts that the tests keep; 5 of 8 elsewhere."""

STOCK_ONLY: tuple[str, ...] = ()
"""Families whose experts the operators do not compute."""

OWN_ROUTER = ("phimoe",)
"""Families whose routing the ``route`` operator does not compute."""

HALVES = ("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe", "afmoe")
"""Families with shared experts as wide as one routed: half the width is twice as many of them, three quarters is no
number."""

MODELS = list(FIELDS)
ALL = [*FIELDS, *UNRECORDED]

# Softmax, shared experts, groups and biases of choice, biases and other layouts: what the operators, whose tests run on
# every device, are given by a family.
ON_CUDA = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")


def on_devices(names: Iterable[str]) -> list[tuple[str, str]]:
    """(name, device): every family on the CPU, those of :data:`ON_CUDA` on a GPU, too."""
    return [(name, device) for name in names for device in DEVICES if device == "cpu" or name in ON_CUDA]


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of a family in evaluation mode, every expert tensor and correction bias filled."""
    prefix, fields = {**FIELDS, **UNRECORDED}[name]
    config_class = getattr(transformers, f"{prefix}Config")
    torch.manual_seed(seed)
    if name == "qwen3_vl_moe_text":
        config = config_class(
            text_config={**SHARED, **fields, **changes, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                                            "mrope_section": [2, 1, 1]}},
            vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                           "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        )  # fmt: skip
        model_class = transformers.Qwen3VLMoeForConditionalGeneration
    else:
        config = config_class(**{**SHARED, **fields, **changes})
        model_class = getattr(transformers, f"{prefix}ForCausalLM")
    model: PreTrainedModel = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for block in moe_blocks(model):
        for module in (block.router, block.experts, block.module):
            recurse = module is not block.module  # of the block only what it holds itself
            for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    # As from_pretrained does, not model.to(dtype): rotary buffers, which no checkpoint holds, and biases stay float32.
    saved = model.state_dict().keys()
    for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor_name in saved and "correction_bias" not in tensor_name:
            tensor.data = tensor.data.to(dtype)
    return model


def experts_case_of(module: Any, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> ExpertsCase:
    """What a family's experts are given, for the brute force: its formula as transformers' modeling code has it."""
    options: dict[str, Any] = {}
    if "GptOss" in type(module).__name__:
        options = {"transposed": True, "interleaved": True, "up_offset": 1.0}
        options |= {"limit": module.limit, "alpha": module.alpha}
        options |= {"gate_up_bias": module.gate_up_proj_bias.cpu(), "down_bias": module.down_proj_bias.cpu()}
    gate_up, down = module.gate_up_proj.detach().cpu(), module.down_proj.detach().cpu()
    return ExpertsCase(x, gate_up, down, experts, weights, options=options)


def logits_of(model: PreTrainedModel, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(tokens.to(input_device(model)), **inputs).logits
    return logits


def reloaded(load: Callable[..., Any], folder: Path, **options: Any) -> PreTrainedModel:
    """A loaded model with every weight copied: torch rounds products differently where memory is not aligned, and the
    weights of a mapped file need not be."""
    model: PreTrainedModel = load(folder, **options)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def keep_of(model: PreTrainedModel, name: str, seed: int = 0, fewer: int = 0) -> tuple[tuple[int, ...], ...]:
    """Random experts to keep in every layer, as many in every group; ``fewer`` less in every second layer."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for layer, block in enumerate(moe_blocks(model)):
        count = KEEP.get(name, 5) - (fewer if layer % 2 else 0)
        size = block.num_experts // block.groups
        chosen = [
            group * size + torch.randperm(size, generator=generator)[: count // block.groups]
            for group in range(block.groups)
        ]
        kept.append(tuple(sorted(torch.cat(chosen).tolist())))
    return tuple(kept)


def plan_for(model: PreTrainedModel, keep: tuple[tuple[int, ...], ...]) -> PruningPlan:
    blocks = moe_blocks(model)
    names = tuple(block.name for block in blocks)
    return PruningPlan(model_type_of(model), blocks[0].num_experts, blocks[0].top_k, names, keep)


def channels_for(model: PreTrainedModel, width: int, seed: int = 0) -> KeptChannels:
    """Random channels for every expert that a model has to keep."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for block in moe_blocks(model):
        order = torch.rand(block.num_experts, width_of(block), generator=generator).argsort(1)
        kept.append(order[:, :width].sort(1).values)
    return KeptChannels.of(kept, width_of(moe_blocks(model)[0]))


def mask_routers(model: PreTrainedModel, keep: tuple[tuple[int, ...], ...]) -> None:
    """Dropped experts' logits at -inf inside the family's own router code: pruning by definition.

    A correction bias, which selects without regard to logits, is put at -inf as well.
    """

    def masked(forward: Any, dropped: list[int]) -> Any:
        def run(*args: Any) -> Any:
            linear = F.linear

            def with_mask(*operands: Any) -> torch.Tensor:
                return linear(*operands).index_fill(-1, torch.tensor(dropped, device=operands[0].device), -torch.inf)

            F.linear = with_mask  # type: ignore[assignment]
            try:
                return forward(*args)
            finally:
                F.linear = linear

        return run

    for block, kept in zip(prunable_blocks(model), keep, strict=True):
        dropped = [expert for expert in range(block.num_experts) if expert not in kept]
        block.router.forward = masked(block.router.forward, dropped)
        held = block.module.named_parameters(recurse=False)
        for name, tensor in (*held, *block.module.named_buffers(), *block.router.named_parameters()):
            if "correction_bias" in name or name == "expert_bias":
                tensor.data[..., dropped] = -torch.inf


def on_experts(model: PreTrainedModel, hook: Callable[[int, nn.Module, tuple[torch.Tensor, ...]], Any]) -> list[Any]:
    """Registers ``hook(layer, module, (x, experts, weights))`` before every MoE layer's experts; returns handles."""
    return [
        block.experts.register_forward_pre_hook(lambda module, args, layer=layer: hook(layer, module, args))
        for layer, block in enumerate(moe_blocks(model))
    ]
