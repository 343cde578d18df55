"""Numbers of bytes as people write them: ``48GB``, ``44.7 GiB``."""

import re
from fractions import Fraction

_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGTP", 1)},
}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?) ?([A-Z]+)", re.ASCII | re.IGNORECASE)


def bytes_in(text: str) -> int:
    """The whole bytes of a number and its unit: B, kB, MB, GB, TB, PB are powers of 1000, KiB to PiB of 1024, in
    capital or small letters.

    Raises:
        ValueError: it is something else, or less than a byte.
    """
    written = _WRITTEN.fullmatch(text.strip())
    unit = None if written is None else _UNITS.get(written[2].upper())
    count = 0 if written is None or unit is None else int(Fraction(written[1]) * unit)
    if count < 1:
        raise ValueError(f"expected a number of bytes such as 48GB or 44.7GiB, got {text!r}")
    return count
