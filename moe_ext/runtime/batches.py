"""What a model reads: text files by domain, batches of token windows made of them, and the check of any batch."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moe_ext.data.tokens import Texts, token_ids
from moe_ext.models.blocks import base_of, text_config
from moe_ext.storage.formats import check_label, parse_json, shown

_NO_PROSE = (
    *(".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".orc", ".avro"),
    *(".npy", ".npz", ".pt", ".pth", ".pkl", ".bin", ".safetensors", ".gguf", ".pdf", ".docx", ".xlsx"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz"),
)
_INSTEAD = "give it as data (--data, moe_ext.data.batches), which reads rows of text and chats"


def read_domains(paths: Iterable[Path]) -> dict[str, str]:
    """Reads text by domain: a file is one domain named after its stem, a folder is the ``*.txt`` files in it.

    Returns:
        Domain name to text, in the order given (a folder's files by name).

    Raises:
        ValueError: a path that does not exist, a folder without ``*.txt``, two files of one name, an empty file, text
            that is not UTF-8, or a file that is data and no prose: by its suffix, such as ``.jsonl``, or because every
            line of it is a JSON object or list.
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
                raise ValueError(f"two text files are named {shown(file.stem)}; a domain needs a name of its own")
            if file.suffix.lower() in _NO_PROSE:
                raise ValueError(f"{file} is no prose but {file.suffix[1:]}: {_INSTEAD}")
            try:
                texts[file.stem] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text: {error}") from None
            if not texts[file.stem].strip():
                raise ValueError(f"{file} is empty")
            if _is_json_lines(texts[file.stem]):
                raise ValueError(f"{file} is no prose but lines of JSON: {_INSTEAD}")
    return texts


def _is_json_lines(text: str) -> bool:
    """Whether every line that is not blank is a JSON object or list."""
    for line in text.splitlines():
        if not line.strip():
            continue
        if line.lstrip()[0] not in "{[":
            return False
        try:
            parse_json(line)
        except ValueError:
            return False
    return True


def prompt_batch(text: str, tokenizer: Any, model: Any) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, both (1, S), of a text to continue.

    Raises:
        ValueError: no token, or one that the model does not have.
    """
    tokens = torch.tensor([token_ids(text, tokenizer)], dtype=torch.int64)
    if tokens.numel() == 0:
        raise ValueError("prompt: has no token")
    check_tokens("prompt", tokens, vocabulary_of(model))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def token_batches(
    texts: Texts | Sequence[str], tokenizer: Any, *, window: int = 512, batch_size: int = 8
) -> Iterator[dict[str, Tensor]]:
    """Cuts texts into windows that do not overlap, padded on the right to the longest of their batch.

    Args:
        texts: documents, or domain to one or several; the domains are not used.
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
    documents = [
        document
        for given in (texts.values() if isinstance(texts, Mapping) else texts)
        for document in ([given] if isinstance(given, str) else given)
    ]
    windows: list[list[int]] = []
    for document in documents:
        tokens = token_ids(document, tokenizer)
        windows += [tokens[start : start + window] for start in range(0, len(tokens), window)]
    for start in range(0, len(windows), batch_size):
        rows = windows[start : start + batch_size]
        input_ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # with 0
        attention_mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
        yield {"input_ids": input_ids, "attention_mask": attention_mask}


def vocabulary_of(model: Any) -> int:
    """Rows of a model's token embedding: the tokens that it has."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return int(text_config(model).vocab_size if weight is None else weight.shape[0])


def check_tokens(where: str, tokens: Tensor, vocabulary: int) -> None:
    """ValueError, beginning with ``where``, unless all are int32 or int64 and a model with that vocabulary has them: on
    a GPU the embedding's own check would take the whole CUDA context down."""
    if tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{where}: has tokens of {tokens.dtype}; expected int32 or int64")
    if tokens.numel() == 0:
        return
    least, most = (int(bound) for bound in tokens.aminmax())
    if least < 0 or most >= vocabulary:
        raise ValueError(
            f"{where}: expected tokens from 0 and below the model's vocabulary size {vocabulary}, "
            f"got {least if least < 0 else most}"
        )


class CheckedBatch(NamedTuple):
    """A batch as the model takes it.

    Attributes:
        inputs: arguments of the forward of the model without its head.
        counted: (B * S,) bool, the tokens that are no padding; None: all.
    """

    inputs: dict[str, Tensor]
    counted: Tensor | None


# What tokenizers and collators give beside a decoder's inputs; a model without such an argument does not need it.
_LEFT_OUT = frozenset(
    ("token_type_ids", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "overflowing_tokens",
     "num_truncated_tokens", "length", "labels")
)  # fmt: skip
_PASSED_ON = frozenset(("cu_seq_lens_q", "cu_seq_lens_k"))  # by every decoder to its attention, without naming them
_OURS = frozenset(("counted", "domain"))  # which this package reads, and no model


def check_batch(index: int, batch: Mapping[str, Any], model: Any) -> CheckedBatch:
    """A batch for a model, without what tokenizers add and the model does not take.

    Raises:
        ValueError: a malformed batch, a token that the model does not have, or an input that it does not take and that
            no tokenizer gives.
    """
    batch = as_batch(index, batch)
    shape = tuple(batch["input_ids"].shape)
    taken = set(inspect.signature(base_of(model).forward).parameters)
    inputs = {}
    for name, value in batch.items():
        if name in _OURS:
            continue
        if name not in taken and name not in _PASSED_ON and "input_ids" in taken:
            if name in _LEFT_OUT:
                continue
            raise ValueError(f"batch {index}: {type(base_of(model)).__name__} takes no {shown(name)}")
        if not isinstance(value, Tensor):
            raise ValueError(f"batch {index}: {shown(name)} is {type(value).__name__}; expected a tensor")
        inputs[name] = value
    check_tokens(f"batch {index}", inputs["input_ids"], vocabulary_of(model))
    inputs["input_ids"] = inputs["input_ids"].long()
    counted = batch.get("counted")
    if counted is not None and (not isinstance(counted, Tensor) or tuple(counted.shape) != shape):
        raise ValueError(f"batch {index}: 'counted' has shape {_shape(counted)}; expected {shape}")
    mask = inputs.get("attention_mask")
    if mask is None:
        return CheckedBatch(inputs, None if counted is None else counted.reshape(-1).bool())
    seen = _seen(index, mask, shape)
    return CheckedBatch(inputs, (seen if counted is None else seen & counted.bool()).reshape(-1))


def as_batches(batches: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    """:func:`as_batch` of all."""
    for index, batch in enumerate(batches):
        yield as_batch(index, batch)


def as_batch(index: int, batch: Any) -> Mapping[str, Any]:
    """A batch of any kind that holds tokens, as a mapping of tensors: mappings as they are, their lists and numpy
    arrays as tensors; one sequence without a batch dimension as a batch of one; tokens alone as ``input_ids``.

    Raises:
        ValueError: no tokens, sequences of different lengths, or several batches or rows in one.
    """
    if isinstance(batch, Tensor | np.ndarray) or (isinstance(batch, list) and batch and _holds_numbers(batch)):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(f"batch {index} {_what_it_is(batch)}")
    found = {name: _as_tensor(index, name, value) for name, value in batch.items()}
    ids = found["input_ids"]
    shape = tuple(getattr(ids, "shape", ()))
    if len(shape) == 1:
        found = {name: value[None] if _is_like(value, shape) else value for name, value in found.items()}
    elif len(shape) != 2:
        raise ValueError(f"batch {index}: 'input_ids' has shape {shape}; expected (sequences, tokens)")
    domain_of(index, found)
    return found


def domain_of(index: int, batch: Mapping[str, Any]) -> str | None:
    """The domain that a batch is of, if it says so; ValueError unless it is one."""
    domain = batch.get("domain")
    if domain is None:
        return None
    names = set(domain) if isinstance(domain, list) else {domain}
    if len(names) != 1 or not isinstance(name := next(iter(names)), str):
        raise ValueError(f"batch {index}: 'domain' is {shown(domain)}; expected one name: a batch is of one domain")
    check_label(f"batch {index}: 'domain'", name)
    return name


def _is_like(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == shape


def _holds_numbers(value: list[Any]) -> bool:
    """Whether a list is one of token ids, or of such lists."""
    return all(type(each) is int for each in (value[0] if isinstance(value[0], list) and value[0] else value))


def _as_tensor(index: int, name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype != object:
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, np.ndarray) or (isinstance(value, list) and name in _OF_TOKENS):
        rows = list(value)
        if any(isinstance(row, Tensor) for row in rows):
            raise ValueError(
                f"batch {index}: {shown(name)} is a list of tensors; expected one tensor (a data set's "
                "with_format('torch'), or a collate_fn that stacks)"
            )
        lengths = {len(row) if isinstance(row, list | np.ndarray) else None for row in rows}
        if len(lengths) > 1:
            raise ValueError(f"batch {index}: {shown(name)} has rows of different lengths; pad them to one")
        try:
            return torch.tensor([list(row) for row in rows] if None not in lengths else rows)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"batch {index}: {shown(name)} holds no numbers ({error})") from None
    return value


_OF_TOKENS = frozenset(("input_ids", "attention_mask", "position_ids", "counted"))


def _what_it_is(batch: Any) -> str:
    """Of a batch that holds no tokens, and what to do."""
    instead = "; texts and rows of data sets are made into batches by moe_ext.data.batches"
    if isinstance(batch, str):
        return f"is a text, not tokens{instead}"
    if isinstance(batch, Mapping):
        return f"is no mapping with 'input_ids': it has {shown(sorted(map(str, batch)), 120)}{instead}"
    if isinstance(batch, list | tuple) and batch:
        return f"is a {type(batch).__name__} of {type(batch[0]).__name__}; expected a mapping with 'input_ids'"
    return f"is no mapping with 'input_ids': {type(batch).__name__}"


def _seen(index: int, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, S) bool: the tokens that are no padding. A mask of (B, 1, S, S), which says who sees whom, is True, or 0 in
    what it adds, where it lets one see; a token that does not see itself is padding."""
    if tuple(mask.shape) == shape:
        return mask.bool()
    if mask.dim() != 4:
        raise ValueError(
            f"batch {index}: 'attention_mask' has shape {_shape(mask)}; expected {shape}, or 4 dimensions (batch, 1, "
            "tokens, tokens)"
        )
    rows, length = shape
    if mask.shape[0] not in (1, rows) or tuple(mask.shape[2:]) != (length, length):
        raise ValueError(
            f"batch {index}: 'attention_mask' has shape {_shape(mask)}; expected {(rows, 1, length, length)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"batch {index}: 'attention_mask' of 4 dimensions is {mask.dtype}; expected bool, or floats that are added"
        )
    own = mask.diagonal(dim1=2, dim2=3)  # (B, heads, S)
    own = own if mask.dtype == torch.bool else own > torch.finfo(mask.dtype).min / 2
    return own.any(1).expand(rows, length)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))
