"""Where the checkout's files are that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "examples" / "demo_model"
