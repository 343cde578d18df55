"""How much memory this process has had at most."""

import re
from pathlib import Path


def peak_resident_bytes() -> int | None:
    """Peak resident set since the program was started; None where the system does not say (it has no /proc).

    Not getrusage's ``ru_maxrss``: that begins with what the parent process had.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
