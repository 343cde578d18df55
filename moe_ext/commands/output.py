"""Where commands print: results to stdout, as tables or as JSON, everything else to stderr.

What is printed may be names out of anybody's files: none is markup, and none moves the terminal's cursor.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from unicodedata import category

from rich.console import Console
from rich.text import Text

from moe_ext.storage.dated_results import without_infinities


class _Console(Console):
    """A console that can print every name: what its file cannot encode, and control characters, as escapes."""

    def render_str(self, text: str, **options: Any) -> Text:  # every text passes through here
        return super().render_str(printable(text, self.file), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Texts are left to the terminal to wrap, so that a path in one is whole."""
        options.setdefault("soft_wrap", all(isinstance(each, str) for each in objects))
        super().print(*objects, **options)


def printable(text: str, file: IO[str]) -> str:
    """The text with control characters, and those that the file's encoding lacks, as escapes."""
    plain = "".join(
        ascii(each)[1:-1] if category(each) in ("Cc", "Cs") and each not in "\n\t" else each for each in text
    )
    encoding = getattr(file, "encoding", None) or "utf-8"
    return plain.encode(encoding, "backslashreplace").decode(encoding)


out = _Console(markup=False, emoji=False)  # results
errors = _Console(stderr=True, markup=False, emoji=False)  # everything else


@contextmanager
def working(on: str) -> Iterator[None]:
    """Shows what is being done until the ``with`` block is left."""
    with errors.status(Text(printable(on, errors.file))):  # not a string: a status takes that for markup
        yield


def print_json(result: Any) -> None:
    """JSON that every reader takes: a number that is not finite is null."""
    print(json.dumps(without_infinities(result), indent=2, allow_nan=False))
