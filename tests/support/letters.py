"""A tokenizer of letters, a small Mixtral that reads them, and the context that every scored token is promised."""

from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

LETTERS = "abcdefgh"
BOS = "<s>"
POSITIONS = 32


def letter_tokenizer(*, bos: bool) -> PreTrainedTokenizerBase:
    """A token a letter; with ``bos`` it prepends one by default, as Mixtral's does."""
    tokenizer = Tokenizer(models.WordLevel({BOS: 0} | {letter: i for i, letter in enumerate(LETTERS, 1)}, BOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A $B", [(BOS, 0)])
    arguments = {"tokenizer_object": tokenizer, "bos_token": BOS, "model_max_length": POSITIONS}
    return PreTrainedTokenizerFast(**arguments)


def small_mixtral(seed: int = 0) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=len(LETTERS) + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,  # large, so that the context matters
    )
    model = MixtralForCausalLM(config)
    model.train(False)
    return model


documents = st.lists(st.text(LETTERS, min_size=2, max_size=20), min_size=1, max_size=3)


@st.composite
def window_and_stride(draw: st.DrawFn) -> tuple[int, int]:
    window = draw(st.integers(1, 12))
    return window, draw(st.integers(1, window))


def contexts(length: int, window: int, stride: int) -> Iterator[tuple[int, int]]:
    """``(start, target)`` of every scored token: it is predicted from ``tokens[start:target]``.

    The token a window scores last is the successor of the window's last: windows end at ``window``, ``window + stride``
    and so on, the last of them with the document.
    """
    ends = [min(end, length - 1) for end in range(window, length - 1 + stride, stride)] or [length - 1]
    for target in range(1, length):
        end = next(end for end in ends if end >= target)
        yield max(0, end - window), target
