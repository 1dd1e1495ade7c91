"""Figures of GPUs, by name and from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner.estimate.hardware import FILE, read_hardware
from autotp_plan.schemas.errors import OptionError

H100: dict[str, Any] = json.loads(FILE.read_text())["h100"]


def test_every_figure_has_a_note() -> None:
    for name, entry in json.loads(FILE.read_text()).items():
        assert read_hardware(name).operations_per_s == entry["operations_per_s"]
        assert entry["notes"].keys() == entry.keys() - {"name", "notes"}


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ours.json"
    file.write_text(json.dumps({"ours": {**H100, "efficiency": 0.4}}))
    assert read_hardware(str(file)).efficiency == 0.4
    file.write_text(json.dumps({"ours": {**H100, "efficiency": 0.4}, "others": H100}))
    assert read_hardware(f"{file}:ours").efficiency == 0.4
    with pytest.raises(OptionError, match=r"ours\.json:ours, .*ours\.json:others"):
        read_hardware(str(file))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({**H100, "efficiency": 1.5}, "at most 1"),
        ({**H100, "operations_per_s": 0}, "ours.operations_per_s"),
        ({**H100, "memory_bytes_per_s": "fast"}, "ours.memory_bytes_per_s"),
        ({**H100, "link_efficiency": True}, "ours.link_efficiency"),
        ({key: value for key, value in H100.items() if key != "inside_node_latency_s"}, "ours.inside_node_latency_s"),
        ({**H100, "speed": 3}, "ours.speed"),
        ({**H100, "name": 3}, "ours.name"),
        ([], "an object"),
    ],
)
def test_what_is_refused(tmp_path: Path, entry: Any, said: str) -> None:
    file = tmp_path / "ours.json"
    file.write_text(json.dumps({"ours": entry}))
    with pytest.raises(OptionError, match=said):
        read_hardware(str(file))


def test_what_is_not_there() -> None:
    with pytest.raises(OptionError, match="h100, a100, or a file"):
        read_hardware("b900")
