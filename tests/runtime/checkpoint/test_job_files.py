"""What DeepSpeed writes into a job's files can be read as data on every Python."""

from __future__ import annotations

import copyreg
import enum
from pathlib import Path
from typing import Any

import pytest


def test_enums_are_read_as_data_also_from_the_first_pythons_3_11(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from autotp_plan.runtime.deepspeed.job_files import enums_by_value, read_saved
    from autotp_plan.schemas.errors import CheckpointError

    def by_name(member: Any, protocol: int) -> Any:  # as Python 3.11.0 to 3.11.3
        return getattr, (type(member), member.name)

    for cls in (enum.Enum, ZeroStageEnum):
        monkeypatch.setattr(cls, "__reduce_ex__", by_name)
    torch.save({"zero_stage": ZeroStageEnum.gradients}, tmp_path / "by name.pt")
    with pytest.raises(CheckpointError, match="holds more than data"):
        read_saved(tmp_path / "by name.pt", trust=False)
    with enums_by_value():
        torch.save({"zero_stage": ZeroStageEnum.gradients}, tmp_path / "by value.pt")
    assert ZeroStageEnum not in copyreg.dispatch_table
    assert read_saved(tmp_path / "by value.pt", trust=False) == {"zero_stage": ZeroStageEnum.gradients}
