"""What the package's own files say they are: a format's name and version, written and checked in one place."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: what its files say they are, such as ``"moe_ext.pruning_plan"``.
        version: the one that this package writes; others are not read.
        title: what a message calls it, such as ``"a pruning plan"``.
    """

    name: str
    version: int
    title: str

    def marks(self) -> dict[str, str | int]:
        """The entries of a JSON object that say what it is."""
        return {"format": self.name, "format_version": self.version}

    def metadata(self) -> dict[str, str]:
        """The same as a safetensors file's metadata, which is text."""
        return {name: str(value) for name, value in self.marks().items()}

    def check(self, marks: Mapping[str, object]) -> None:
        """Checks a JSON object's entries.

        Raises:
            ValueError: another format, or a version that is not read.
        """
        if marks.get("format") != self.name:
            raise ValueError(f"not {self.title}: its metadata names format {marks.get('format')!r}, not {self.name!r}")
        version = marks.get("format_version")
        if type(version) is int and version > self.version:
            raise ValueError(
                f"written by a newer moe_ext (format version {version}, known is {self.version}): upgrade moe_ext"
            )
        if type(version) is not int or version != self.version:
            raise ValueError(f"format_version: expected {self.version}, got {version!r}")

    def check_metadata(self, metadata: Mapping[str, str] | None) -> dict[str, str]:
        """Checks a safetensors file's metadata and returns it; ValueError as :meth:`check`."""
        found = dict(metadata or {})
        version = found.get("format_version", "")
        self.check({**found, "format_version": int(version) if version.isdecimal() else version})
        return found
