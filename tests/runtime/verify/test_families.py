"""Families of docs/families.md that are planned by inference, each from its config to the proof."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autotp_plan.huggingface.meta_model import build_model
from autotp_plan.schemas.errors import CheckpointError
from benchmarks.every_family import families, plan_and_prove, write_config
from tests.helpers.paths import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270), pytest.mark.filterwarnings("ignore")]

NORMAL = ("bert",)
"""A head whose bias has a second name."""
INFERRED = re.findall(
    r"^\| ([\w-]+) \| inference", (ROOT / "docs" / "families.md").read_text(encoding="utf-8"), re.MULTILINE
)


@pytest.mark.parametrize(
    "family", [*NORMAL, *(pytest.param(one, marks=pytest.mark.slow) for one in INFERRED if one not in NORMAL)]
)
def test_a_family_is_inferred_and_proven(tmp_path: Path, family: str) -> None:
    write_config(family, tmp_path)
    found = plan_and_prove(family, tmp_path, 2)
    assert found["outcome"] == "right", found["reason"]
    assert found["rules"].startswith("inference")


@pytest.mark.slow
def test_every_default_config_is_complete(tmp_path: Path) -> None:
    """Those that transformers cannot build lack a package, or are refused by its own checks whatever they say."""
    failed = {}
    for family in families():
        folder = tmp_path / family
        folder.mkdir()
        write_config(family, folder)
        try:
            build_model(folder, on_meta="all")
        except CheckpointError as error:
            failed[family] = error.faults[0].got
    assert {family: reason for family, reason in failed.items() if "requires the" not in reason}.keys() <= {
        "gemma4_assistant",
        "gemma4_unified_assistant",
    }, failed
