"""What cannot be written is found before a job trains, and every rank hears of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autotp_plan.runtime.checkpoint import outputs
from autotp_plan.runtime.checkpoint.save_shards import check_shards_folder
from autotp_plan.runtime.train_outputs import more_saves
from autotp_plan.runtime.train_report import Report, check_metrics
from autotp_plan.schemas.errors import AutoTPError
from tests.helpers.launch import launch

MODES: dict[str, dict[str, Any]] = {
    "fp32": {}, "fp32, ZeRO 1": {"zero_optimization": {"stage": 1}}, "bf16": {"bf16": {"enabled": True}},
    "bf16, ZeRO 2": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    "bf16, ZeRO 3": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}},
    "SGD": {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
}  # fmt: skip
NOWHERE = Path("/proc/nowhere")


def code_of(attempt: Callable[[], object]) -> tuple[str | None, str]:
    with pytest.raises(AutoTPError) as caught:
        attempt()
    return caught.value.faults[0].code, str(caught.value)


@pytest.mark.parametrize(
    "text", ['{"step": 1}\n[]\n', "garbage\n", '{"step": "1"}\n', "\xff\n", '{"loss": 2}\n{"step": 2}\n']
)
def test_a_file_that_holds_no_metrics_is_refused_and_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics"
    path.write_bytes(text.encode("latin-1"))
    code, message = code_of(lambda: check_metrics(path))
    assert code == "metrics-file" and "--metrics" in message and path.read_bytes() == text.encode("latin-1")
    assert list(tmp_path.iterdir()) == [path]


def test_places_where_no_metrics_can_be_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null"), tmp_path / "none" / "metrics"):
        assert code_of(partial(check_metrics, path))[0] == "metrics-file"
    assert code_of(lambda: check_metrics(Path("/proc/metrics")))[0] == "output-not-writable"


def test_metrics_of_an_earlier_run_are_taken_also_without_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    check_metrics(path)
    assert not path.exists()
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    check_metrics(path)
    Report(path, True).begin(1)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_folder_for_shards_is_left_as_it_was(tmp_path: Path) -> None:
    check_shards_folder(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / ".autotp-unfinished").touch()  # as a kill in its first write leaves it
    check_shards_folder(begun)
    assert [path.name for path in begun.iterdir()] == [".autotp-unfinished"]
    noted = tmp_path / "noted"
    noted.mkdir()
    (noted / "note").touch()
    assert code_of(lambda: check_shards_folder(noted))[0] == "folder-not-writable"
    assert code_of(lambda: check_shards_folder(noted / "note"))[0] == "folder-not-writable"
    assert [path.name for path in noted.iterdir()] == ["note"]


def test_a_small_file_is_written_synced_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path, tmp_path / "a" / "b"):
        outputs.check_writable(folder)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "in", NOWHERE):
        assert code_of(partial(outputs.check_writable, folder))[0] == "output-not-writable"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, message = code_of(lambda: outputs.check_writable(tmp_path))
    assert code == "output-not-writable" and "No space left" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_without_room_is_refused_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {tmp_path / "job": {"3 checkpoints of 2.0 GB": 6_000_000_000}, tmp_path: {"shards of 1.0 GB": 10**9}}
    disk = SimpleNamespace(f_blocks=10, f_bavail=7, f_frsize=10**9)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    outputs.check_room(needs)
    disk.f_bavail = 6
    code, message = code_of(lambda: outputs.check_room(needs))
    assert code == "no-room"
    assert "6.0 GB free" in message and "about 7.0 GB: 3 checkpoints of 2.0 GB, shards of 1.0 GB" in message
    disk.f_blocks = 0  # a file system that does not say
    outputs.check_room(needs)


def test_the_number_of_checkpoints_to_come(tmp_path: Path) -> None:
    assert more_saves(tmp_path / "new", 20, None, None) == 1
    assert more_saves(tmp_path / "new", 20, 10, None) == 2
    assert more_saves(tmp_path / "new", 21, 10, None) == 3
    assert more_saves(tmp_path / "new", 21, 10, 1) == 2
    assert more_saves(tmp_path / "new", 21, 10, 5) == 3


def in_two_ranks(work: Path) -> dict[str, Any]:
    """Inside a rank: what is estimated and what is saved, and what each rank hears of one that cannot write."""
    import torch
    import torch.distributed as dist

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.train import _train
    from tests.helpers.models import batch

    found: dict[str, Any] = {}
    options = {
        "dp_size": None, "zero_stage": 1, "batch_size": 1, "seq_length": 8, "learning_rate": 1e-2, "precision": "auto",
        "data": None, "ds_config": None, "seed": 0, "save_every": None, "num_steps": 1,
        "save_shards": None, "checkpoints": None, "metrics": None,
    }  # fmt: skip
    garbage = work / "garbage"
    attempts: dict[str, dict[str, Any]] = {
        "garbage": {"metrics": garbage},
        "no shards": {"save_shards": garbage},
        "no job": {"checkpoints": NOWHERE},
        "no job on rank 1": {"checkpoints": NOWHERE if dist.get_rank() else work / "job"},
    }
    for name, changes in attempts.items():
        attempt = partial(_train, work / "plan.json", "no such shards", **{**options, **changes})
        found[name] = code_of(attempt)
    plan = load_plan(work / "plan.json")
    sizes = {}
    for name, mode in MODES.items():
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}, **mode,
        }  # fmt: skip
        dtype = torch.bfloat16 if "bf16" in mode else torch.float32
        plan.check_outputs(config, checkpoints=work / name, shards=work / "shards of it", dtype=dtype)
        model = plan.load_model(work / "checkpoint", dtype=dtype)
        engine, *_ = plan.initialize(model, config=config)
        engine.backward(engine(input_ids=batch(1), labels=batch(1), use_cache=False).loss)
        engine.step()
        plan.save_checkpoint(engine, work / name)
        sizes[name] = outputs.checkpoint_bytes(plan.document, config, dtype)
        engine.destroy()
    plan.save_shards(model, work / "saved shards")
    found["sizes"], found["shards"] = sizes, outputs.shards_bytes(plan.document)
    return found


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_sizes_are_those_that_are_saved_and_all_ranks_hear_of_one(tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    changes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048}
    folder = save_checkpoint(tmp_path / "checkpoint", "llama", **changes)
    (tmp_path / "plan.json").write_text(compile_plan(folder, tp_size=2).to_json())
    (tmp_path / "garbage").write_text("garbage\n")
    first, other = launch(in_two_ranks, 2, tmp_path)
    for name, code in {
        "garbage": "metrics-file",
        "no shards": "output-not-writable",
        "no job": "output-not-writable",
        "no job on rank 1": "output-not-writable",
    }.items():
        assert first[name] == other[name] and first[name][0] == code, name
    assert not (tmp_path / "job").exists()
    for name, size in first["sizes"].items():
        saved = sum(path.stat().st_size for path in (tmp_path / name).rglob("*") if path.is_file())
        assert 0.9 * saved < size <= 1.02 * saved, f"{name}: {size} for {saved}"
    saved = sum(path.stat().st_size for path in (tmp_path / "saved shards").glob("*.safetensors"))
    assert 0.95 * saved < first["shards"] <= saved
