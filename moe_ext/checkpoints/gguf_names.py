"""Which of a model's weights a tensor of llama.cpp's holds, by the names alone.

llama.cpp's converter takes the names from a table in its ``gguf`` package, by which several names of the Hub stand for
one of its own. Of those that stand for a tensor, the model has a place for one; what it computes on the way is not in
the table, and so only the architectures below are read.
"""

from collections.abc import Iterable

from transformers import PreTrainedModel

from moe_ext.checkpoints.key_map import sources_of

ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "glm4_moe": "glm4moe",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5-moe",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "minimax_m2": "minimax-m2",
    "granitemoe": "granitemoe",
    "phimoe": "phimoe",
    "afmoe": "afmoe",
    "exaone_moe": "exaone-moe",
    "lfm2_moe": "lfm2moe",
}
"""llama.cpp's architecture by transformers' model type, for those whose tensors were compared."""


def hub_names(architecture: str, layers: int) -> dict[str, list[str]]:
    """The names of the Hub that stand for a tensor of an architecture, all without ``.weight`` or ``.bias``.

    Raises:
        ValueError: the installed ``gguf`` package does not know the architecture.
    """
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in numbers:
        raise ValueError(
            f"the installed gguf package does not know the architecture {architecture!r}: pip install --upgrade gguf"
        )
    names: dict[str, list[str]] = {}
    for name, (_, ours) in gguf.get_tensor_name_map(numbers[architecture], layers).mapping.items():
        names.setdefault(ours, []).append(name)
    return names


def places(
    folder: object, model: PreTrainedModel, tensors: Iterable[str], architecture: str, layers: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For every tensor the key of a checkpoint that would hold the same, and the shape of the model's own.

    Args:
        tensors: names, each ending in ``.weight`` or ``.bias``.

    Raises:
        ValueError: the model has no place for one, or several; or as :func:`hub_names`.
    """
    names = hub_names(architecture, layers)
    spelled: dict[str, str] = {}
    for tensor in tensors:
        stem, _, end = tensor.rpartition(".")
        for name in names.get(stem, ()):  # a parameter of a module, or of the module above
            spelled |= {f"{name}.{end}": tensor, f"{name}_{end}": tensor, name: tensor}
    found: dict[str, dict[str, str]] = {tensor: {} for tensor in tensors}
    for key, source in sources_of(model, spelled).items():
        if not source.converted:
            found[spelled[key]].setdefault(source.target, key)
    for tensor, keys in found.items():
        if len(keys) != 1:
            raise ValueError(
                f"{folder}: {tensor!r} of a {architecture!r} file has "
                f"{'several places' if keys else 'no known place'} in the model"
            )
    own = model.state_dict()
    return {tensor: (key, tuple(own[target].shape)) for tensor, keys in found.items() for target, key in keys.items()}
