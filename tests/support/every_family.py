"""A tiny random model of every family of the installed transformers that goes through its experts interface.

Families are found, not listed: a family is a folder of ``transformers.models`` whose modeling code uses the interface.
Its model is built from its real config class, whose fields are made small by their names. A family that is added to
transformers needs no line here, unless its config has a size of a new name (then a line in ``_SMALL``) or fields that
must fit each other in a way of its own (then a line in ``_ITS_OWN``).
"""

import copy
import inspect
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

from tests.support.families import reloaded

VOCABULARY = 96
"""Tokens; the last eight stand for images, sound and what else is not text."""

# The largest value that a field of this name gets, in any config. A field whose default is smaller, or None, keeps it.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "mel_vocab_size": 16,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 4,
    "make_ngram_vocab_size_divisible_by": 4,
    "heads_per_ngram": 2,
    "max_position_embeddings": 512,
    # Width.
    "hidden_size": 32,
    "d_model": 32,
    "text_hidden_size": 32,
    "out_hidden_size": 32,
    "output_dim": 32,
    "output_proj_dims": 32,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": 32,
    "projection_hidden_dim": 32,
    "projection_intermediate_size": 32,
    "projector_hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "downsample_hidden_size": 8,
    "output_channels": 32,
    "intermediate_size": 24,
    "mlp_dim": 24,
    "encoder_ffn_dim": 24,
    "dense_intermediate_size": 24,
    "moe_intermediate_size": 24,
    "moe_hidden_size": 16,
    "moe_latent_size": 16,
    "expert_hidden_dim": 24,
    "shared_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "router_hidden_size": 16,
    "hc_lowrank": 8,
    "hc_mult": 2,
    "hc_count": 2,
    "hc_sinkhorn_iters": 3,
    "gated_norm_rank": 8,
    "loop_gate_rank": 8,
    # Depth.
    "num_hidden_layers": 4,
    "depth": 1,
    "encoder_layers": 1,
    "n_layers_per_attn_res_block": 2,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 3,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "layer_group_size": 2,
    "full_attention_interval": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "global_attn_every_n_layers": 2,
    "sliding_window_pattern": 2,
    "max_window_layers": 2,
    # Attention.
    "num_attention_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "rotary_dim": 8,
    "sliding_window": 16,
    "sliding_window_size": 16,
    "window_size": 4,
    "canvas_length": 16,
    "d_rel": 4,
    "rel_extent": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "o_groups": 2,
    "o_lora_rank": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
    "index_block_size": 16,
    # Linear attention and state spaces.
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_value_head_dim": 8,
    "linear_num_value_heads": 4,
    "mamba_num_heads": 8,
    "mamba_n_heads": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "block_size": 16,
    # Experts.
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    # Images and sound, which no test feeds.
    "image_size": 32,
    "max_image_size": 32,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "max_source_positions": 16,
    "n_window": 4,
    "n_window_infer": 8,
    "posemb_grid_size": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
}

# Fields that get their small value, too, where the default is None.
_NEEDED = ("num_experts", "n_routed_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
           "head_dim", "top_k_experts")  # fmt: skip

# Values that a field of this name gets whatever its default.
_SET: dict[str, Any] = {
    "initializer_range": 0.3,  # large enough that routing weights and activations differ clearly
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# Fields of a model type that its names and sizes do not say.
def _rope(*section: int) -> dict[str, Any]:
    """Rotary positions of text, height and width."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}


_LINEAR = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_SPARSE = ["dense", "sparse", "sparse", "sparse"]
_GEMMA = {"enable_moe_block": True, "global_head_dim": 8, "pad_token_id": 0}
_ITS_OWN: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": _SPARSE},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [16, 32]},
    "deepseek_ocr2_text": {"mlp_layer_types": _SPARSE},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {"num_hidden_layers": 2, "pyramid_num_routed": [-1, 4]},
    "ernie4_5_vl_moe_text": {"rope_parameters": _rope(1, 1, 2), "moe_intermediate_size": [24, 16]},
    "gemma4_text": _GEMMA,
    "diffusion_gemma_text": _GEMMA,
    "glm4v_moe_text": {"rope_parameters": {**_rope(1, 1, 0), "partial_rotary_factor": 0.5}},
    "glm5_next_text": {"num_key_value_heads": 4, "mlp_layer_types": _SPARSE},
    "inkling_vision": {"patch_size": 8},
    "granitemoehybrid": {"layer_types": _LINEAR},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "hy_v4_vl_text": {"rope_parameters": _rope(1, 1, 0)},
    "inkling2_loop_text": {"loop_layer_index_start": 2, "loop_layer_index_end": 4},
    "kimi_linear": {"layer_types": _LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "muse_spark_audio": {"hidden_sizes": [8, 8, 8, 8]},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCABULARY - 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
    },
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [16, 32]},
    "nemotron_h": {"layer_types": ["moe", "linear_attention", "moe", "full_attention", "mlp", "moe"]},
}


def names() -> list[str]:
    """Every family: the folders of ``transformers.models`` whose modeling code uses the experts interface."""
    roots = map(Path, transformers.models.__path__)
    return sorted(
        {path.parent.name for root in roots for path in root.glob("*/modeling_*.py") if _uses_interface(path)}
    )


def _uses_interface(path: Path) -> bool:
    return "@use_experts_implementation" in path.read_text()


@cache
def _classes(name: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The config of a family's whole model and the class with a head that runs it."""
    types = [key for key in configuration_auto.CONFIG_MAPPING_NAMES
             if configuration_auto.model_type_to_module_name(key) == name]  # fmt: skip
    configs = [configuration_auto.CONFIG_MAPPING[key] for key in types]
    found = []
    for key, config in zip(types, configs, strict=True):
        for mapping in (
            modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        ):
            model = getattr(transformers, mapping[key]) if key in mapping else None
            # Some classes only generate: a part of them runs.
            if model is not None and model.forward is not torch.nn.Module.forward:
                found.append((config, model))
                break
    # The config that holds the others before those it holds.
    parts = {part for config, _ in found for part in config.sub_configs.values()}
    return next((pair for pair in found if pair[0] not in parts), found[0])


def _small(config_class: type[PreTrainedConfig], changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a config class, ``changes`` going to the part of the text decoder."""
    default = config_class()
    fields: dict[str, Any] = {}
    parts = {name: type(part) for name in config_class.sub_configs if isinstance(part := getattr(default, name, None),
                                                                               PreTrainedConfig)}  # fmt: skip
    for name, part in parts.items():
        is_text = name in ("text_config", "thinker_config") or (len(parts) == 1 and "text" in name)
        fields[name] = _small(part, changes if is_text else {})
        if is_text:
            changes = {}
    defaults = {name: one.default for name, one in inspect.signature(config_class.__init__).parameters.items()}
    for name, value in defaults.items():
        if name in _SET:
            fields[name] = _SET[name]
        elif name in _SMALL and (type(value) is int or (value is None and name in _NEEDED)):
            fields[name] = _SMALL[name] if value is None else min(value, _SMALL[name])
        elif name.endswith(("_token_id", "_token_index")) and type(value) is int and value >= VOCABULARY:
            fields[name] = VOCABULARY - 1 - len(fields) % 8
    if type(heads := defaults.get("num_attention_heads")) is int and defaults.get("num_key_value_heads") == heads:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return {**fields, **_ITS_OWN.get(config_class.model_type, {}), **changes}


def config(name: str, **changes: Any) -> PreTrainedConfig:
    """The config of a family's tiny model; ``changes`` are fields of its text decoder's part."""
    config_class, _ = _classes(name)
    return config_class(**_small(config_class, changes))


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of a family in evaluation mode; ``changes`` are fields of its text decoder's config."""
    _, model_class = _classes(name)
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config(name, **changes)).eval()
    _fill(model, torch.Generator().manual_seed(seed))
    if dtype == torch.float32:
        return model
    # Not model.to(dtype): every family has tensors of its own that stay float32.
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return reloaded(model_class.from_pretrained, Path(folder), dtype=dtype).eval()


def _fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Makes random what initialisation leaves constant, so that what becomes of it shows: biases, scales, tables."""
    saved = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in saved or tensor.numel() < 2 or not bool((tensor == tensor.flatten()[0]).all()):
            continue
        if tensor.is_floating_point():
            tensor.data.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
        elif tensor.dim() == 2:  # a table of experts by token
            order = torch.rand(tensor.shape[0], model.config.get_text_config().num_local_experts, generator=generator)
            tensor.data.copy_(order.argsort(1)[:, : tensor.shape[1]])


def inputs(model: PreTrainedModel, seed: int, shape: tuple[int, int] = (2, 12), padding: int = 0) -> dict[str, Tensor]:
    """Random text for a model: ``input_ids`` (B, S) int64 and ``attention_mask`` (B, S) int64, the first ``padding``
    positions of the last row being padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY - 8, shape, generator=generator)
    mask = torch.ones_like(tokens)
    mask[-1, :padding] = 0
    return {"input_ids": tokens, "attention_mask": mask}


_KINDS = "moe_mm_token_type_ids"  # what says that tokens are of images, in families with experts for these
CANVAS = "decoder_input_ids"
"""What a family that generates by denoising is given beside text, and would draw at random."""


def given(model: PreTrainedModel, *, padding: int = 3) -> dict[str, Tensor]:
    """:func:`inputs` with padding; where a family has experts for images, with tokens that count as such, and without
    padding, which would not be known among them."""
    return _completed(model, inputs(model, 1, padding=padding))


def batches_of(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Two batches of different shapes, the first with padding, the second without a mask; as :func:`given`."""
    batches = [given(model, padding=4), _completed(model, inputs(model, 2, (1, 7)))]
    for batch in batches:
        if bool(batch["attention_mask"].all()):
            del batch["attention_mask"]
    return batches


def _completed(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    taken = inspect.signature(model.forward).parameters
    if CANVAS in taken:
        batch[CANVAS] = batch["input_ids"].flip(1)
    if _KINDS in taken:
        batch[_KINDS] = (batch["input_ids"] % 3 == 0).int()
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    return batch


class TinyFamily:
    """A family's tiny models and their folders, each made once, when it is asked for.

    Args:
        name: the family.
        folder: for checkpoints; empty.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder

    @cached_property
    def whole(self) -> PreTrainedModel:
        """The model in float32, for all to look at: no test changes it."""
        return build(self.name)

    def model(self) -> PreTrainedModel:
        """A copy of it, to be changed."""
        return copy.deepcopy(self.whole)

    @cached_property
    def folder(self) -> Path:
        """It as a checkpoint."""
        self.whole.save_pretrained(self._folder / "float32")
        return self._folder / "float32"

    @cached_property
    def whole_in_bfloat16(self) -> PreTrainedModel:
        """The same model in bfloat16, for all to look at."""
        return reloaded(type(self.whole).from_pretrained, self.folder, dtype=torch.bfloat16).eval()

    @cached_property
    def folder_in_bfloat16(self) -> Path:
        """That as a checkpoint."""
        self.whole_in_bfloat16.save_pretrained(self._folder / "bfloat16")
        return self._folder / "bfloat16"
