"""Where commands print: results to stdout, as tables or as JSON, everything else to stderr."""

import json
from typing import Any

from rich.console import Console

out = Console()  # results
errors = Console(stderr=True)  # everything else


def print_json(result: Any) -> None:
    print(json.dumps(result, indent=2))
