"""``moe-ext``: the command line's entry point, and its commands in the order in which the help shows them.

One module per command or pair of commands, each a few calls of the library and a table or JSON. Exit codes: 0 done,
1 the job failed (one or two lines say why; ``--debug`` shows the traceback), 2 wrong usage.
"""

import sys
from collections.abc import Callable
from typing import Annotated

import transformers
import typer

from moe_ext.commands.bench import bench
from moe_ext.commands.calibrate import calibrate, merge
from moe_ext.commands.compare import compare
from moe_ext.commands.compress import compress
from moe_ext.commands.decide import plan, redundancy, score
from moe_ext.commands.demo import demo
from moe_ext.commands.destinations import checked
from moe_ext.commands.evaluate import evaluate
from moe_ext.commands.generate import generate
from moe_ext.commands.info import info
from moe_ext.commands.output import errors
from moe_ext.commands.prune import prune
from moe_ext.commands.quantize import quantize
from moe_ext.commands.report import report
from moe_ext.commands.search import search
from moe_ext.commands.skip import skip
from moe_ext.storage.formats import shortened

app = typer.Typer(
    help="Makes Mixture-of-Experts language models smaller and faster after training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "compress": compress,
    "calibrate": calibrate,
    "merge": merge,
    "score": score,
    "plan": plan,
    "redundancy": redundancy,
    "search": search,
    "report": report,
    "prune": prune,
    "quantize": quantize,
    "skip": skip,
    "eval": evaluate,
    "compare": compare,
    "generate": generate,
    "bench": bench,
    "info": info,
    "demo": demo,
}
for name, command in COMMANDS.items():
    app.command(name)(checked(command))

show_traceback = False  # --debug


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    global show_traceback
    show_traceback = debug


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        app()
    except Exception as error:  # whatever a library raises is one or two lines; --debug shows where it came from
        if show_traceback:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        errors.print("error:", shortened(" ".join(lines[:2])), highlight=False)
        sys.exit(1)
