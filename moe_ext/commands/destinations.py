"""Where a command writes: checked in one place, before a command begins, and said when it fails after all is there."""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import typer

from moe_ext.commands.options import is_destination
from moe_ext.commands.output import errors
from moe_ext.data.sources import parse_source
from moe_ext.storage.files import file_destination, noting_written

_GROWING = "losses"  # is there from the first layer on
_NOT_READ = "scratch"
_NAMES = ("model", "models", "reference")  # of parameters that are a path or a name on the Hub


def checked(command: Callable[..., None]) -> Callable[..., None]:
    """The command, after a check of its destinations; an error once one of them is whole comes with that news."""
    destinations = [
        name
        for name, parameter in inspect.signature(command).parameters.items()
        if any(is_destination(part) for part in get_args(parameter.annotation))
    ]

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        outputs = {option_of(name): arguments[name] for name in destinations if arguments[name] is not None}
        check_places(outputs, {name: given for name, given in arguments.items() if name not in destinations})
        try:
            with noting_written() as written:
                command(**arguments)
        except typer.Exit:
            raise
        except BaseException:
            for option, path in outputs.items():
                if option != f"--{_GROWING}" and Path(os.path.realpath(path)) in written:
                    errors.print(f"{path} is there and whole all the same", markup=False, highlight=False)
            raise

    return run


def option_of(parameter: str) -> str:
    return "--out" if parameter == "save_to" else f"--{parameter.replace('_', '-')}"


def check_places(outputs: Mapping[str, Path], arguments: Mapping[str, Any]) -> None:
    """Checks that nothing that a command reads would be replaced by what it writes.

    Args:
        outputs: where it writes, by option.
        arguments: its other arguments by name; those that are paths are inputs.

    Raises:
        typer.BadParameter: two outputs of one name, or an output that is an input or in a folder that is one.
        FileExistsError: an output is a device, a FIFO or a socket.
    """
    seen: dict[Path, str] = {}
    for option, output in outputs.items():
        place = Path(os.path.realpath(output))
        if place.exists() and not place.is_dir():
            file_destination(place)
        if place in seen:
            raise typer.BadParameter(f"{seen[place]} and {option} are both {output}; give each a name of its own")
        seen[place] = option
        for source in arguments.get("data") or []:
            for file in _files_of(source):
                _check_apart(option, place, "data", file)
        for name, given in arguments.items():
            for path in given if isinstance(given, list) else [given]:
                if name != _NOT_READ and (isinstance(path, Path) or (name in _NAMES and isinstance(path, str))):
                    _check_apart(option, place, name, Path(os.path.realpath(path)))


def _files_of(source: str) -> list[Path]:
    """The files that a source names; none of one that reading it will say more about."""
    try:
        parsed = parse_source(source)
        return parsed.files() if parsed.is_local else []
    except ValueError:
        return []


def _check_apart(option: str, output: Path, name: str, given: Path) -> None:
    """typer.BadParameter if an output is a given input, or in a folder that is one."""
    if not given.exists():
        return  # a name on the Hub, or an error that reading it will say better
    if _same(output, given):
        raise typer.BadParameter(f"{option} {output} is what the command reads ({name}); give another name")
    if given.is_dir():
        if name == "text":  # of such a folder *.txt is read
            inside, files = output.parent == given and output.suffix == ".txt", given.glob("*.txt")
        else:
            inside = output.is_relative_to(given) and (given / "config.json").exists()  # else it is no checkpoint
            files = given.iterdir()
        if inside or any(_same(output, file) for file in files):
            raise typer.BadParameter(f"{option} {output} is in the folder that the command reads ({name}: {given})")


def _same(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except FileNotFoundError:
        return False
