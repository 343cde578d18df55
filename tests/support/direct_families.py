"""Tiny random models of the families whose stacked experts are called past transformers' experts interface."""

from typing import Any

import torch
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    PreTrainedModel,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
)

_WORDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


def _llama4(**changes: Any) -> PreTrainedModel:
    return Llama4ForCausalLM(Llama4TextConfig(**_llama4_text(changes)))


def _llama4_with_images(**changes: Any) -> PreTrainedModel:
    images = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    widths = {"intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    return Llama4ForConditionalGeneration(
        Llama4Config(text_config=_llama4_text(changes), vision_config={**images, **widths}, image_token_index=63)
    )


def _llama4_text(changes: dict[str, Any]) -> dict[str, Any]:
    widths = {"intermediate_size": 24, "intermediate_size_mlp": 40, "head_dim": 8, "num_hidden_layers": 4}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    return {**_WORDS, **_SIZES, **widths, **experts, **changes}


def _longcat(**changes: Any) -> PreTrainedModel:
    widths = {"ffn_hidden_size": 40, "expert_ffn_hidden_size": 24, "q_lora_rank": 16, "kv_lora_rank": 8}
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 8, "zero_expert_num": 3, "moe_topk": 3}
    sizes = {**_SIZES, "num_key_value_heads": 4}
    return LongcatFlashForCausalLM(
        LongcatFlashConfig(**_WORDS, **sizes, **widths, **heads, **experts, num_layers=2, **changes)
    )


def _step3p7(**changes: Any) -> PreTrainedModel:
    widths = {"intermediate_size": 40, "moe_intermediate_size": 24, "share_expert_dim": 24, "head_dim": 8}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "swiglu_limits": [None, 0.0, 1.5, 0.5]}
    layers = {"num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
    attention = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 16}
    text = {**_WORDS, **_SIZES, **widths, **experts, **layers, **attention, "num_sliding_attention_heads": 2, **changes}
    images = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    return Step3p7ForConditionalGeneration(Step3p7Config(text_config=text, vision_config=images, image_token_id=63))


_BUILDERS = {"llama4": _llama4, "llama4_images": _llama4_with_images, "longcat_flash": _longcat, "step3p7": _step3p7}
NAMES = ("llama4", "longcat_flash", "step3p7")
"""Those whose forward pass runs: transformers 5.24's own code fails in that of Llama 4 with images."""


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode; ``changes`` are fields of its text decoder's config."""
    torch.manual_seed(0)
    model = _BUILDERS[name](**changes).eval()
    generator = torch.Generator().manual_seed(0)
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "experts" in key or "correction_bias" in key:  # some are left as they come from memory, or constant
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * (0.05 if "bias" in key else 0.3))
    return model
