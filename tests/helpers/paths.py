"""Folders of the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "autotp_plan"
PLANS = PACKAGE / "plans"
PRESETS = PACKAGE / "planner" / "presets"
EXAMPLES = ROOT / "examples"
