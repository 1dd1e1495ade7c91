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


class Runs:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_a_file_holds_besides_data_is_said_without_escapes_and_advice(tmp_path: Path) -> None:
    import pickle
    from fractions import Fraction

    import torch

    from autotp_plan.runtime.deepspeed.job_files import check_is_data, read_saved
    from autotp_plan.schemas.errors import CheckpointError

    torch.save({"half": Fraction(1, 2)}, tmp_path / "zip")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Runs()))
    (tmp_path / "text").write_text("none of torch's")
    said: dict[str, str] = {}
    for read in (lambda path: read_saved(path, trust=False), check_is_data):
        for name in ("zip", "pickle", "text"):
            with pytest.raises(CheckpointError, match="holds more than data") as caught:
                read(tmp_path / name)
            got = said[f"{name} {len(said)}"] = caught.value.faults[0].got
            assert got and len(got) < 120 and not set("\x1b\n") & set(got) and "weights_only" not in got, got
    assert said["zip 0"] == "Unsupported global: GLOBAL fractions.Fraction was not an allowed global by default"
    assert said["pickle 1"] == "Unsupported operand 149" and said["zip 3"] == "fractions.Fraction"
