"""Options that several commands share, with their help and checks."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moe_ext.decision.criteria import CRITERIA, OUTSIDE, point_of


def known_criterion(criterion: str | None) -> str | None:
    """An unknown criterion is wrong usage, found before any work."""
    if criterion is not None and criterion not in OUTSIDE:
        try:
            point_of(criterion)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return criterion


_destinations: list[Any] = []


def destination(help: str, *names: str, show_default: bool = False) -> Any:
    """Where a command writes: ``--out`` and ``-o``, on every command where its result goes and nothing else, or another
    option for what comes beside it. :mod:`moe_ext.commands.destinations` checks what is given."""
    _destinations.append(typer.Option(*(names or ("--out", "-o")), help=help, show_default=show_default))
    return _destinations[-1]


def is_destination(option: Any) -> bool:
    """Whether an option says where a command writes."""
    return any(option is known for known in _destinations)


Model = Annotated[str, typer.Argument(help="Checkpoint folder, or a name on the Hugging Face Hub.", show_default=False)]
Statistics = Annotated[Path, typer.Argument(help="File written by `moe-ext calibrate`.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens a sequence.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences a batch.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as saved.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda where the CUDA kernels were built.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the checkpoint brings or names.")
]
AllowMissing = Annotated[
    bool,
    typer.Option("--allow-missing", help="Fill tensors that the checkpoint lacks with random numbers."),
]
Criterion = Annotated[
    str | None,
    typer.Option(
        help=f"One of {', '.join((*CRITERIA, *OUTSIDE))}, or a triple such as 'S(1,0,2)'. aimer takes a checkpoint "
        "where the others take statistics; mone needs statistics made with --outputs.",
        show_default=False,
        callback=known_criterion,
    ),
]
Objective = Annotated[
    Literal["task-agnostic", "task-specific"] | None,
    typer.Option(help="Use the criterion that arXiv 2606.15716 finds best for it."),
]
Strict = Annotated[
    bool,
    typer.Option("--strict/--no-strict", help="Whether experts that the operators cannot run are an error."),
]
Keep = Annotated[
    str | None,
    typer.Option(help="Experts that every layer keeps: a number, or one for each layer: 6,5,6,4.", show_default=False),
]
AllowSuper = Annotated[
    bool, typer.Option("--allow-super", help="Let super experts (arXiv 2507.23279) go as others do.")
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="Model to compare with: a checkpoint, run without skipping, or what `eval --save-predictions` wrote.",
        show_default=False,
    ),
]
Domain = Annotated[
    str | None, typer.Option(help="Only this domain of statistics made with --data.", show_default=False)
]
Balance = Annotated[
    bool, typer.Option("--balance", help="As if every domain of the statistics had the same number of tokens.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the criterion 'random'.")]
Sequential = Annotated[
    bool,
    typer.Option("--sequential", help="Hold one decoder layer of the checkpoint folder in memory at a time."),
]
Scratch = Annotated[
    Path | None,
    typer.Option(help="Folder for hidden states, twice, with --sequential; in memory if absent."),
]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds that torchrun's processes wait for each other.")]


def counts_in(keep: str | None) -> int | list[int] | None:
    """The numbers of ``--keep``."""
    if keep is None:
        return None
    try:
        counts = [int(count) for count in keep.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--keep {keep}: expected a number, or numbers with commas between them") from None
    return counts if "," in keep else counts[0]
