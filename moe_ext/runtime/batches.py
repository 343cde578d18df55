"""What a model reads: text files by domain, batches of token windows made of them, and the check of any batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def read_domains(paths: Iterable[Path]) -> dict[str, str]:
    """Reads text by domain: a file is one domain named after its stem, a folder is the ``*.txt`` files in it.

    Returns:
        Domain name to text, in the order given (a folder's files by name).

    Raises:
        ValueError: a path that does not exist, a folder without ``*.txt``, two files of one name, an empty file, or
            text that is not UTF-8.
    """
    texts: dict[str, str] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"text {path} does not exist")
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"folder {path} holds no *.txt file")
        for file in files:
            if file.stem in texts:
                raise ValueError(f"two text files are named {file.stem!r}; a domain needs a name of its own")
            try:
                texts[file.stem] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text: {error}") from None
            if not texts[file.stem].strip():
                raise ValueError(f"{file} is empty")
    return texts


def token_batches(
    texts: Mapping[str, str] | Sequence[str], tokenizer: Any, *, window: int = 512, batch_size: int = 8
) -> Iterator[dict[str, Tensor]]:
    """Cuts texts into windows that do not overlap, padded on the right to the longest of their batch.

    Args:
        texts: documents; a mapping's keys are not used.
        tokenizer: a transformers tokenizer.
        window: tokens a sequence, at most.
        batch_size: sequences a batch.

    Yields:
        ``input_ids`` and ``attention_mask``, both (B, S) int64 with B <= batch_size and S <= window.

    Raises:
        ValueError: window or batch_size below 1.
    """
    if window < 1 or batch_size < 1:
        raise ValueError(f"window is {window}, batch_size is {batch_size}; expected at least 1")
    documents = texts.values() if isinstance(texts, Mapping) else texts
    windows: list[list[int]] = []
    for document in documents:
        tokens = tokenizer(document, verbose=False)["input_ids"]
        windows += [tokens[start : start + window] for start in range(0, len(tokens), window)]
    for start in range(0, len(windows), batch_size):
        rows = windows[start : start + batch_size]
        input_ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # with 0
        attention_mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
        yield {"input_ids": input_ids, "attention_mask": attention_mask}


def check_batch(index: int, batch: Mapping[str, Tensor]) -> Tensor | None:
    """The batch's counted tokens (B * S,) bool, or None if it has no attention mask; ValueError for a malformed one."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(f"batch {index} is no mapping with 'input_ids'")
    shape = tuple(getattr(batch["input_ids"], "shape", ()))
    if len(shape) != 2:
        raise ValueError(f"batch {index}: 'input_ids' has shape {shape}; expected (sequences, tokens)")
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"batch {index}: {name!r} is {type(value).__name__}; expected a tensor")
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    if tuple(mask.shape) != shape:
        raise ValueError(f"batch {index}: 'attention_mask' has shape {tuple(mask.shape)}; expected {shape}")
    return mask.reshape(-1).bool()
