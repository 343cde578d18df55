"""What lies in a checkpoint folder beside weights and config: tokenizer, templates, code, licence, whatever it is.

It is copied as it is, never read and saved again: other versions of transformers could not read what this one writes.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

# Weights in any format, with what belongs to them alone.
_WEIGHTS = (
    ".bin", ".ckpt", ".distcp", ".gguf", ".h5", ".index.json", ".msgpack", ".npz", ".onnx", ".onnx_data", ".onnx.data",
    ".ot", ".pdparams", ".pt", ".pth", ".safetensors", ".tflite",
)  # fmt: skip
# Of the unpruned model: its configs (params.json is Mistral's own) and its card.
_OF_THE_MODEL = ("config.json", "params.json", "readme.md", "readme.txt", "readme")


def copy_other_files(source: Path, target: Path) -> None:
    """Copies everything of a checkpoint folder but weights, their index, the config and the model card.

    Folders are copied whole, unless weights lie in them: those are of another model or format. Hidden files are not
    copied. A link is followed if it leads to a file of the folder or, as in the Hub's cache, to a blob of the same
    repository; a warning names another.
    """
    left_out: list[str] = []
    for file in _files(source, source, left_out):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    if left_out:
        shown = ", ".join(sorted(left_out)[:5])
        warnings.warn(f"{source}: not copied, as links to elsewhere: {shown[:400]}", stacklevel=2)


def _files(top: Path, folder: Path, left_out: list[str]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or _is_weights(path):
            continue
        if folder == top and path.name.lower() in _OF_THE_MODEL:
            continue
        if path.is_symlink() and not (path.is_file() and _is_inside(top, path)):
            left_out.append(str(path.relative_to(top)))
        elif path.is_dir():
            if not any(map(_is_weights, path.rglob("*"))):
                yield from _files(top, path, left_out)
        elif path.is_file():
            yield path


def _is_weights(path: Path) -> bool:
    return path.name.lower().endswith(_WEIGHTS)


def _is_inside(top: Path, link: Path) -> bool:
    """Whether a link leads to a place in the folder, or in the blobs beside a snapshot of the Hub's cache."""
    folder, place = Path(os.path.realpath(top)), Path(os.path.realpath(link))
    blobs = folder.parent.parent / "blobs"
    return place.is_relative_to(folder) or (folder.parent.name == "snapshots" and place.parent == blobs)
