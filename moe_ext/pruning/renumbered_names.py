"""Names of experts in what a checkpoint says of its quantisation, once the experts have other numbers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_ext.checkpoints.key_map import Source
from moe_ext.pruning.kept_parts import Slice

Positions = Mapping[str, Mapping[int, int]]
"""By what stands before an expert's number in a name: the new number of each that is kept."""

_NUMBERED = re.compile(r"experts\W{1,3}\d")
_FROM_LAYER = re.compile(r"(?:^|\.)((?:layers|blocks|h)\.\d+\..*)$")
_GONE = object()


def positions_of(
    sources: Mapping[str, Source], slices: Mapping[str, Slice], stored: Iterable[str], last: Sequence[int]
) -> dict[str, dict[int, int]]:
    """Of a checkpoint that names experts one by one.

    Args:
        stored: all its keys; layers for multi-token prediction are in no model.
        last: the experts that the last layer keeps, and those layers with it.
    """
    found: dict[str, dict[int, int]] = {}
    for name in stored:
        if (expert := re.search(r"(?<=\.experts\.)\d+(?=\.)", name)) is not None:
            found[_from_layer(name[: expert.start()])] = {number: place for place, number in enumerate(last)}
    for name, source in sources.items():
        if source.expert is not None and source.target in slices:
            kept = slices[source.target].keep
            found[_from_layer(name[: source.expert_at[0]])] = {expert: place for place, expert in enumerate(kept)}
    return found


def renumbered(declared: Any, positions: Positions) -> Any:
    """What a config says of quantisation, with the names of experts that are kept renumbered, and those of others left
    out of lists and of keys.

    Raises:
        ValueError: a pattern that holds an expert's number, or the name of an expert that is not in the checkpoint.
    """
    result = _renumbered(declared, positions)
    assert result is not _GONE
    return result


def _renumbered(value: Any, positions: Positions) -> Any:
    if isinstance(value, dict):
        pairs = ((_renumbered(key, positions), _renumbered(item, positions)) for key, item in value.items())
        return {key: item for key, item in pairs if key is not _GONE and item is not _GONE}
    if isinstance(value, list):
        return [item for item in (_renumbered(item, positions) for item in value) if item is not _GONE]
    if not isinstance(value, str) or not _NUMBERED.search(value):
        return value
    for match in re.finditer(r"(?<=experts\.)\d+(?=\.|$)", value):
        before, after = value[: match.start()], value[match.end() :]
        if not re.fullmatch(r"(?:[\w-]+\.)+", before) or not re.fullmatch(r"(?:\.[\w-]+)*\.?", after):
            break
        known = positions.get(_from_layer(before))
        if known is not None:
            number = known.get(int(match[0]))
            return _GONE if number is None else f"{before}{number}{after}"
    raise ValueError(f"quantization_config names {value[:100]!r}, and the experts would be renumbered")


def _from_layer(name: str) -> str:
    found = _FROM_LAYER.search(name)
    return found[1] if found else name
