"""After a power loss at any moment, what has its name is complete, and the same command makes the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotp_plan.planner import compile_plan, convert, merge, presplit, reshard
from autotp_plan.planner.cli.main import main
from autotp_plan.schemas import documents
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards import output_file, output_folder
from autotp_plan.schemas.untrusted import plain_files
from tests.helpers.checkpoints import write_llama
from tests.helpers.random_shards import files_of
from tests.runtime.checkpoint.test_sound_jobs import logged, states

pytestmark = pytest.mark.sweep

OPTIONS: Any = {"max_file_bytes": 20_000, "workers": 1}
Disk = dict[str, bytes | None]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, one of .bin files, a plan and shards."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    work = tmp_path_factory.mktemp("power")
    model = write_llama(work / "model", num_files=2)
    plan = compile_plan(model, tp_size=2)
    (work / "plan.json").write_text(plan.to_json())
    presplit(plan, model, work / "shards", **OPTIONS)
    (work / "bin").mkdir()
    tensors = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    torch.save(tensors, work / "bin" / "pytorch_model.bin")
    shutil.copy(model / "config.json", work / "bin")
    return work


def _parts(work: Path, output: Path) -> None:
    for number in (1, 2):
        presplit(Plan.read(work / "plan.json"), work / "model", output, part=(number, 2), **OPTIONS)


COMMANDS: Mapping[str, Callable[[Path, Path], object]] = {
    "presplit": lambda work, output: presplit(Plan.read(work / "plan.json"), work / "model", output, **OPTIONS),
    "parts": _parts,
    "merge": lambda work, output: merge(work / "shards", output, workers=1),
    "reshard": lambda work, output: reshard(work / "shards", output, tp_size=4, **OPTIONS),
    "convert": lambda work, output: convert(work / "bin", output, workers=1),
}


def disks(disk: Path, log: Path, run: Callable[[], object]) -> Iterator[tuple[bool, Disk]]:
    """Run a command; then every state that `disk` may have had after a power loss, and whether the command was done."""
    disk.mkdir()
    with logged(disk / "x", log):
        run()
    events = [json.loads(line) for line in log.read_text().splitlines()]
    for returned, state in states([*events, {"kind": "returned", "path": "all"}]):
        yield bool(returned), state


def built(folder: Path, state: Disk) -> Path:
    """A disk in a state."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in sorted(state.items(), key=lambda item: len(Path(item[0]).parts)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True) if data is None else path.write_bytes(data)
    return folder


def wrong_states(work: Path, tmp_path: Path, command: str) -> list[str]:
    """The states in which a file that has its name is not complete, or from which the same command does not go on."""
    expected = tmp_path / "expected"
    COMMANDS[command](work, expected)
    right = files_of(expected)
    wrong, count = [], 0
    for number, (returned, state) in enumerate(
        disks(tmp_path / "disk", tmp_path / "log", lambda: COMMANDS[command](work, tmp_path / "disk/a/out"))
    ):
        count += 1
        after = built(tmp_path / "after", state)
        found = files_of(after / "a/out") if (after / "a/out").is_dir() else {}
        named = {name: data for name, data in found.items() if not name.startswith(".")}
        torn = [name for name, data in named.items() if right.get(name) != data]
        wrong += [f"{number}: {torn} are named and not complete"] if torn else []
        if found and not any(name.startswith(".") for name in found) and found != right:
            wrong.append(f"{number}: it looks finished")
        if returned and found != right:
            wrong.append(f"{number}: the command had ended")
        if number % 11 == 0 and not torn:
            COMMANDS[command](work, after / "a/out")
            if files_of(after / "a/out") != right:
                wrong.append(f"{number}: it goes on to something else")
    assert count > 20
    return wrong


@pytest.mark.parametrize("command", COMMANDS)
def test_after_a_power_loss_at_any_moment_a_command_goes_on(work: Path, tmp_path: Path, command: str) -> None:
    assert wrong_states(work, tmp_path, command) == []


@pytest.mark.parametrize("forget", ["file", "folder", "parents"])
def test_a_sync_that_is_forgotten_is_found(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: str
) -> None:
    if forget == "file":
        monkeypatch.setattr(output_file.OutputFile, "sync", lambda self: None)
    elif forget == "folder":
        monkeypatch.setattr(output_folder, "sync_folder", lambda folder: None)
    else:
        monkeypatch.setattr(output_folder, "make_folder", lambda folder: folder.mkdir(parents=True))
        monkeypatch.setattr(output_folder.OutputFolder, "complete", _without_parents)
    assert wrong_states(work, tmp_path, "presplit")


def _without_parents(self: output_folder.OutputFolder) -> None:
    self.sync()
    (self.path / self.journal_name).unlink()
    self.sync()


def _run(*arguments: str) -> None:
    result = CliRunner().invoke(main, [*arguments])
    assert result.exit_code == 0, result.output


FILES: Mapping[str, tuple[str, ...]] = {
    "compile": ("compile", "--model", "{work}/model", "--tp", "2", "-o", "{disk}/file"),
    "export": ("export", "{work}/plan.json", "--to", "deepspeed", "-o", "{disk}/file"),
}


def wrong_files(disk: Path, log: Path, old: str, new: Callable[[Path], object]) -> list[str]:
    """States in which `file` is neither the old one nor the new one, or not the new one when the command had ended."""

    def run() -> None:
        if old:
            documents.write_atomically(disk / "file", old)
        new(disk / "file")

    found = list(disks(disk, log, run))
    right = (disk / "file").read_bytes()
    assert len(found) > 4
    allowed = (right, None, old.encode() if old else None)
    return [
        f"{number}: {state.get('file')!r:.80}"
        for number, (returned, state) in enumerate(found)
        if state.get("file") not in allowed or (returned and state.get("file") != right)
    ]


@pytest.mark.parametrize("old", ["", "old\n"])
@pytest.mark.parametrize("command", FILES)
def test_a_file_that_a_command_writes_is_the_old_or_the_new_one(
    work: Path, tmp_path: Path, command: str, old: str
) -> None:
    arguments = [word.format(work=work, disk=tmp_path / "disk") for word in FILES[command]]
    assert wrong_files(tmp_path / "disk", tmp_path / "log", old, lambda _: _run(*arguments)) == []


def test_a_stamp_is_there_or_the_plan_as_it_was(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """verify writes the plan with its stamp; what it proves is not tried here."""
    text = (work / "plan.json").read_text()
    wrong = wrong_files(
        tmp_path / "disk", tmp_path / "log", text, lambda path: documents.write_atomically(path, text + "\n")
    )
    assert wrong == []
    with monkeypatch.context() as patch:
        patch.setattr(plain_files, "sync_folder", lambda folder: None)
        assert wrong_files(
            tmp_path / "forgotten", tmp_path / "log2", "", lambda path: documents.write_atomically(path, text)
        )
