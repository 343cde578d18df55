"""The options that say what a command reads, declared once: ``--text``, ``--data`` and what goes with them."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moe_ext.commands.reading import Reading
from moe_ext.data.sources import FORM

Text = Annotated[
    list[Path] | None,
    typer.Option("--text", help="Text file, or folder of *.txt: one domain a file.", show_default=False),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar=FORM,
        help="Instead: .txt, .jsonl (.gz, .zst), .json, .parquet or .arrow, a folder of them, or a data set's name on "
        "the Hub. Weights mix several by tokens; each is a domain. See docs/calibration_data.md.",
        show_default=False,
    ),
]
DataColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        help="Which columns hold what: text=A, messages=A or prompt=A,response=B; also input, system, tools, domain. "
        "NAME:... for one source. Usual names are recognised.",
        show_default=False,
    ),
]
Template = Annotated[
    str | None,
    typer.Option(help="File with a chat template, or the name of one of the tokenizer's.", show_default=False),
]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be read, and say how many.")
]
Tokens = Annotated[
    str | None, typer.Option(help="Tokens to read of --data, such as 4M; all if absent.", show_default=False)
]
Samples = Annotated[int | None, typer.Option(min=1, help="Rows to read of --data.", show_default=False)]
ShuffleSeed = Annotated[
    int | None, typer.Option("--seed", help="Read the rows of --data shuffled by it.", show_default=False)
]
LongRows = Annotated[
    Literal["split", "cut"] | None,
    typer.Option("--long", help="Rows longer than a window: split (if absent), or cut after a sentence."),
]
Packing = Annotated[
    bool, typer.Option("--packing", help="Several rows a window, kept apart, where the model does keep them apart.")
]
BatchTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens a batch with its padding, in the place of --batch-size.")
]
Ahead = Annotated[int | None, typer.Option(min=0, help="Batches that a process of its own makes ahead: 16; 0: none.")]


def _rows(
    text: Text = None,
    data: Data = None,
    columns: DataColumns = None,
    template: Template = None,
    skip_bad_rows: SkipBadRows = False,
    samples: Samples = None,
    seed: ShuffleSeed = None,
) -> None:
    """What is read."""


def _windows(
    tokens: Tokens = None,
    long: LongRows = None,
    packing: Packing = False,
    batch_tokens: BatchTokens = None,
    ahead: Ahead = None,
) -> None:
    """How it is cut into windows and batches."""


def reads(*, windows: bool, needed: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with these options in the place of its parameter ``reading``, a :class:`Reading` of what they say. An
    option that the command declares itself reaches both, and the reading only with ``--data``.

    Args:
        windows: whether the command runs a model over batches; others take whole texts.
        needed: whether there has to be text.
    """

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = signature.parameters
        options: dict[str, inspect.Parameter] = {}
        for group in (_rows, _windows) if windows else (_rows,):
            options |= inspect.signature(group).parameters
        added = [parameter for name, parameter in options.items() if name not in own]
        parameters = [each for name, parameter in own.items() for each in (added if name == "reading" else [parameter])]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in options if name not in own}
            if given["data"]:
                given |= {name: arguments[name] for name in options if name in own}
            command(reading=Reading(**given, needed=needed), **arguments)

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return with_options
