"""Shared by all tests: hypothesis settings and small random Mixtral models."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

from tests.support.mixtral import MixtralFactory

# Correctness never depends on time; the same examples every run, so that a failure can be reproduced.
settings.register_profile("moe_ext", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("moe_ext")
logging.disable_progress_bar()
os.environ["HF_HUB_OFFLINE"] = "1"  # also for the subprocesses of the command line tests
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several workers: they share the cores, and so do their subprocesses
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a forked process, or one of torchrun's, has: torch's own products round by how many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_mixtral() -> MixtralFactory:
    """Builds a random Mixtral with E = 8, K = 2, L = 3; keyword arguments override config fields."""

    def build(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object) -> MixtralForCausalLM:
        fields: dict[str, object] = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "initializer_range": 0.3,  # large enough that routing weights and activations differ clearly
        }
        torch.manual_seed(seed)
        model = MixtralForCausalLM(MixtralConfig(**{**fields, **overrides})).eval()
        for parameter in model.parameters():  # not model.to(dtype): from_pretrained leaves the rotary buffers float32
            parameter.data = parameter.data.to(dtype)
        return model

    return build
