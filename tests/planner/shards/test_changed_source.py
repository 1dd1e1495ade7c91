"""A source that changes between two attempts, while it is read, or afterwards: nothing is made of two states of it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import compile_plan, convert, merge, presplit, reshard
from autotp_plan.planner.shards import watch
from autotp_plan.schemas.errors import CheckpointError, OutputError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards import output_file
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME, MANIFEST_NAME
from autotp_plan.schemas.shards.parts import find_parts
from autotp_plan.schemas.storage.safetensors_header import read_header
from tests.helpers.checkpoints import write_llama
from tests.helpers.random_shards import files_of
from tests.helpers.stopped import stopped

pytestmark = pytest.mark.sweep

OPTIONS: Any = {"max_file_bytes": 40_000}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_llama(tmp_path / "model", num_files=3, vocab_size=512)
    (folder / "chat_template.jinja").write_text("old template")
    return folder


@pytest.fixture
def plan(model: Path) -> Plan:
    return compile_plan(model, tp_size=2)


def large(path: Path) -> Any:
    return max(read_header(path).tensors, key=lambda tensor: tensor.stop - tensor.start)


def flip(path: Path, stamp: bool = True, at: int = 5) -> None:
    """Change a byte of which the fingerprint has no sample; without `stamp` size, time and inode stay.

    Byte -1 is the last of the file, in a small tensor, of which the fingerprint has all.
    """
    status = path.stat()
    tensor = large(path)
    assert tensor.stop - tensor.start > 3 * 4096
    with path.open("r+b") as file:
        file.seek(tensor.start + at if at >= 0 else status.st_size + at)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (1000 if stamp else 0)))


def weights(folder: Path) -> Path:
    """The file with the embedding."""
    return folder / "model-00001-of-00003.safetensors"


def edit(folder: Path) -> None:
    flip(weights(folder))
    (folder / "chat_template.jinja").write_text("new template")


def touch(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("files", [1, 4, 7])
def test_continued_after_the_checkpoint_was_corrected_it_is_the_corrected_one(
    model: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    out, said = tmp_path / "out", list[str]()
    stopped(lambda: presplit(plan, model, out, workers=1, **OPTIONS), monkeypatch, files)
    edit(model)
    presplit(plan, model, tmp_path / "fresh", **OPTIONS)
    presplit(plan, model, out, notes=said.append, **OPTIONS)
    assert files_of(out) == files_of(tmp_path / "fresh")
    assert (len(said) == 1 and "written again" in said[0]) == (files > 1)


def test_without_the_comparison_it_would_be_a_mixture(
    model: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped(lambda: presplit(plan, model, out, workers=1, **OPTIONS), monkeypatch, 7)
    edit(model)
    presplit(plan, model, tmp_path / "fresh", **OPTIONS)
    monkeypatch.setattr(watch.Watch, "differing", lambda *_: [])
    presplit(plan, model, out, **OPTIONS)
    assert files_of(out) != files_of(tmp_path / "fresh")


@pytest.mark.parametrize("how", ["touched", "copied", "an old journal"])
def test_a_checkpoint_that_is_the_same_in_another_place_or_time_is_continued(
    model: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    out = tmp_path / "out"
    presplit(plan, model, tmp_path / "fresh", **OPTIONS)
    stopped(lambda: presplit(plan, model, out, workers=1, **OPTIONS), monkeypatch, 7)
    numbers = {name: (out / name).stat().st_ino for name in names_in(out)}
    if how == "touched":
        touch(model)
    elif how == "copied":
        model = shutil.copytree(model, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    else:
        journal = out / JOURNAL_NAME
        lines = [line for line in journal.read_bytes().splitlines(True) if not line.startswith(b'{"read"')]
        journal.write_bytes(b"".join(lines))
    said: list[str] = []
    presplit(plan, model, out, notes=said.append, **OPTIONS)
    assert files_of(out) == files_of(tmp_path / "fresh") and said == []
    assert all((out / name).stat().st_ino == number for name, number in numbers.items()), "not written a second time"
    presplit(plan, model, out, **OPTIONS)  # finished


@pytest.mark.parametrize("name", ["chat_template.jinja", "model-00001-of-00003.safetensors"])
@pytest.mark.parametrize("part", [None, (1, 1)])
def test_a_finished_folder_whose_checkpoint_changed_is_said_so(
    model: Path, plan: Plan, tmp_path: Path, name: str, part: Any
) -> None:
    presplit(plan, model, tmp_path / "out", **OPTIONS)
    before = files_of(tmp_path / "out")
    if name.endswith("jinja"):
        (model / name).write_text("new template")
    else:
        flip(model / name, stamp=False)
    with pytest.raises(OutputError, match=r"(?s)its source has changed since.*remove the folder, or give another"):
        presplit(plan, model, tmp_path / "out", part=part, **OPTIONS)
    assert files_of(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out")
    presplit(plan, model, tmp_path / "out", **OPTIONS)  # what is advised


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "chat_template.jinja").write_text("a longer template"), "chat_template.jinja"),
        (lambda folder: (folder / "notes.md").write_text("mine"), "notes.md"),
        (lambda folder: flip(weights(folder), at=-1), "model-00001"),
    ],
)
def test_a_finished_folder_of_another_checkpoint_says_what_differs(
    model: Path, plan: Plan, tmp_path: Path, change: Callable[[Path], object], named: str
) -> None:
    presplit(plan, model, tmp_path / "out", **OPTIONS)
    change(model)
    with pytest.raises(OutputError, match=rf"(?s)its source has changed since.*{named}"):
        presplit(plan, model, tmp_path / "out", **OPTIONS)


def while_reading(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Call `change` when config.json is about to be complete: after all weights, which are copied first."""
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if Path(target).name == "config.json":
            change()
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)


def replaced(folder: Path) -> None:
    """Another file takes the place of one, with its size and time."""
    path = weights(folder)
    status = path.stat()
    shutil.copy(path, folder / ".new")
    flip(folder / ".new")
    os.utime(folder / ".new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (folder / ".new").rename(path)


def renamed_tensors(folder: Path) -> None:
    """The same bytes under a header that says something else."""
    path = weights(folder)
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"tp"'))


CHANGES: dict[str, Callable[[Path], object]] = {
    "overwritten": edit,
    "replaced": replaced,
    "another header": renamed_tensors,
    "config": lambda folder: (
        (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"vocab_size": 512', '"vocab_size": 513')
        )
        and None
    ),
    "side file gone": lambda folder: (folder / "chat_template.jinja").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_changes_while_it_is_read_is_noticed_and_nothing_is_finished(
    model: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        while_reading(patch, lambda: CHANGES[change](model))
        with pytest.raises((CheckpointError, OutputError), match=r"changed while it was read|No such file"):
            presplit(plan, model, out, workers=1, **OPTIONS)
    assert not (out / MANIFEST_NAME).exists() and (out / JOURNAL_NAME).exists()
    if change in ("overwritten", "replaced", "side file gone"):  # the same names, headers and settings: it goes on
        presplit(plan, model, out, **OPTIONS)
        presplit(plan, model, tmp_path / "fresh", **OPTIONS)
        assert files_of(out) == files_of(tmp_path / "fresh")


def test_a_checkpoint_that_is_touched_while_it_is_read_is_the_same(
    model: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    presplit(plan, model, tmp_path / "fresh", **OPTIONS)
    with monkeypatch.context() as patch:
        while_reading(patch, lambda: touch(model))
        presplit(plan, model, tmp_path / "out", **OPTIONS)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_a_change_that_hides_is_found_by_checksums(
    model: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Size, time and inode stay: between two attempts, and during one."""
    checked: Any = {**OPTIONS, "checksum_source": True}
    out = tmp_path / "out"
    stopped(lambda: presplit(plan, model, out, workers=1, **checked), monkeypatch, 7)
    flip(weights(model), stamp=False)
    presplit(plan, model, tmp_path / "fresh", **checked)
    presplit(plan, model, out, **checked)
    assert files_of(out) == files_of(tmp_path / "fresh")
    with monkeypatch.context() as patch:
        while_reading(patch, lambda: flip(weights(model), stamp=False))
        with pytest.raises(CheckpointError, match="changed while it was read"):
            presplit(plan, model, tmp_path / "during", workers=1, **checked)


def test_parts_of_two_states_are_not_finished_and_the_part_that_is_named_mends_it(
    model: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    presplit(plan, model, out, part=(1, 2), **OPTIONS)
    presplit(plan, model, tmp_path / "old", part=(2, 2), **OPTIONS)
    edit(model)
    with pytest.raises(OutputError, match=r"(?s)another state of the source.*--part 1/2 again"):
        presplit(plan, model, out, part=(2, 2), **OPTIONS)
    assert not (out / MANIFEST_NAME).exists()
    with monkeypatch.context() as patch:
        patch.setattr(output_file.OutputFile, "create", _no_room)
        with pytest.raises(OutputError, match="No space left"):
            presplit(plan, model, out, part=(1, 2), **OPTIONS)
    found = find_parts(out)
    assert found is not None and found.missing == [1], "what it has lost is not complete"
    presplit(plan, model, out, part=(1, 2), **OPTIONS)
    presplit(plan, model, tmp_path / "fresh", **OPTIONS)
    assert files_of(out) == files_of(tmp_path / "fresh")


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_parts_of_copies_on_two_machines_are_finished(model: Path, plan: Plan, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    presplit(plan, model, tmp_path / "out", part=(1, 2), **OPTIONS)
    presplit(plan, elsewhere, tmp_path / "out", part=(2, 2), **OPTIONS)
    presplit(plan, model, tmp_path / "fresh", **OPTIONS)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


@pytest.fixture
def bin_model(model: Path, tmp_path: Path) -> Iterator[Path]:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    folder = tmp_path / "bin"
    folder.mkdir()
    tensors = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    for name in ("config.json", "chat_template.jinja"):
        shutil.copy(model / name, folder / name)
    yield folder


@pytest.mark.parametrize("command", ["merge", "reshard", "convert"])
@pytest.mark.parametrize("when", ["between", "during", "after"])
def test_merge_reshard_and_convert_notice_it_too(
    model: Path, plan: Plan, bin_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, when: str
) -> None:
    shards = tmp_path / "shards"
    presplit(plan, model, shards)
    source = bin_model if command == "convert" else shards

    said: list[str] = []

    def run(output: Path) -> None:
        if command == "merge":
            merge(source, output, workers=1, notes=said.append)
        elif command == "reshard":
            reshard(source, output, tp_size=4, workers=1, notes=said.append, **OPTIONS)
        else:
            convert(source, output, workers=1, notes=said.append)

    def change() -> None:
        if command == "convert":
            path = source / "pytorch_model.bin"
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        else:
            flip(next(source.glob("tp-00*")))
        (source / "chat_template.jinja").write_text("new template")

    out = tmp_path / "out"
    if when == "between":
        stopped(lambda: run(out), monkeypatch, 1 if command == "convert" else 2)
        change()
        run(out)
    elif when == "during":
        with monkeypatch.context() as patch:
            while_reading(patch, change)
            with pytest.raises(CheckpointError, match="changed while it was read"):
                run(out)
        run(out)
    else:
        run(out)
        run(out)  # finished, and the same
        change()
        with pytest.raises(OutputError, match=r"(?s)its source has changed since.*in chat_template.jinja"):
            run(out)
        (source / "chat_template.jinja").write_text("a longer template")
        if command == "convert":
            with pytest.raises(OutputError, match=r"(?s)its source has changed since.*in chat_template.jinja"):
                run(out)
        assert said == []
        return
    assert len(said) == 1 or (when == "between" and not said), "what was complete may not be made of what changed"
    assert all(f"in {out} written again, as what they are made of has changed: " in note for note in said)
    said.clear()
    run(tmp_path / "fresh")
    assert said == [] and files_of(out) == files_of(tmp_path / "fresh")
