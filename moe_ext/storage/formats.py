"""What the package's own files say they are, and how a malformed one is refused: a format's name and version, JSON read
strictly, messages of bounded length.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

MOST_CHARACTERS = 500
"""Of a message about a file, whatever the file holds."""


def shown(value: object, most: int = 80) -> str:
    """A value as a message quotes it: its ``repr``, shortened in the middle."""
    try:
        return shortened(repr(value), most)
    except ValueError:  # Python writes out no number of more than 4300 digits
        return "a number too long to be shown"


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text of at most so many characters: its beginning and its end."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 5]} ... {text[-end:]}"


class FileFormatError(ValueError):
    """A file does not hold what it should; the message has at most ``MOST_CHARACTERS``."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


def check_label(what: str, label: object) -> None:
    """ValueError, beginning with ``what``, unless it is a text that UTF-8 can hold."""
    if not isinstance(label, str):
        raise ValueError(f"{what}: expected a text, got {shown(label)}")
    if _LONE_SURROGATE.search(label):
        raise ValueError(f"{what}: {shown(label)} holds half of a character, which UTF-8 cannot")


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(content: str | bytes) -> Any:
    """The value that a JSON text stands for.

    Raises:
        ValueError: not JSON in UTF-8, or JSON that readers understand differently: a name twice in an object, a number
            beyond float64 or NaN, half of a character, or nested too deeply.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_each_name_once
        )
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half of a character, which UTF-8 cannot") from None
    except RecursionError:
        raise ValueError("truncated, or not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(shortened(f"truncated, or not JSON ({error})", 200)) from None
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{shortened(digits, 40)} is beyond float64")
    return number


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} twice in an object")
    return found


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: what its files say they are, such as ``"moe_ext.pruning_plan"``.
        version: the one that this package writes.
        title: what a message calls it, such as ``"a pruning plan"``.
        oldest: the first version that is read; None: only the one that is written.
    """

    name: str
    version: int
    title: str
    oldest: int | None = None

    def marks(self) -> dict[str, str | int]:
        """The entries of a JSON object that say what it is."""
        return {"format": self.name, "format_version": self.version}

    def metadata(self) -> dict[str, str]:
        """The same as a safetensors file's metadata, which is text."""
        return {name: str(value) for name, value in self.marks().items()}

    def check(self, marks: object) -> None:
        """Checks a JSON object's entries.

        Raises:
            ValueError: no object, another format, or a version that is not read.
        """
        if not isinstance(marks, Mapping):
            raise ValueError(f"not {self.title}: expected a JSON object with format {self.name!r}")
        if marks.get("format") != self.name:
            raise ValueError(
                f"not {self.title}: its metadata names format {shown(marks.get('format'))}, not {self.name!r}"
            )
        version = marks.get("format_version")
        if type(version) is int and version > self.version:
            raise ValueError(
                f"written by a newer moe_ext (format version {shown(version)}, known is {self.version}): "
                "upgrade moe_ext"
            )
        oldest = self.version if self.oldest is None else self.oldest
        if type(version) is not int or version < oldest:
            expected = f"{oldest} to {self.version}" if oldest < self.version else str(self.version)
            raise ValueError(f"format_version: expected {expected}, got {shown(version)}")

    def check_metadata(self, metadata: Mapping[str, str] | None) -> dict[str, str]:
        """Checks a safetensors file's metadata and returns it; ValueError as :meth:`check`."""
        found = dict(metadata or {})
        version = found.get("format_version", "")
        # At most nine digits: Python converts no number of any length.
        number = int(version) if re.fullmatch("[0-9]{1,9}", version) else version
        self.check({**found, "format_version": number})
        return found
