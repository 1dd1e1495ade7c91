"""Folders of the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PLANS = ROOT / "plans"
PRESETS = ROOT / "planner" / "presets"
EXAMPLES = ROOT / "examples"
