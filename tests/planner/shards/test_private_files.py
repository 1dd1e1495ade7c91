"""What was private stays private, links do not lead out, and what is left out is named."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from autotp_plan.planner import compile_plan, merge, presplit, reshard
from autotp_plan.planner.cli.main import main
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME, PLAN_NAME
from tests.helpers.checkpoints import write_llama


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_llama(tmp_path / "model", num_files=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def test_shards_of_a_private_file_are_private(model: Path, tmp_path: Path) -> None:
    """From the moment that they are made; the side file of another mode keeps it; merge and reshard alike."""
    plan = compile_plan(model, tp_size=2)
    (model / "model-00001-of-00002.safetensors").chmod(0o600)
    (model / "tokenizer.json").chmod(0o640)
    opened = os.open
    made: list[int] = []

    def watched(path: str, flags: int, mode: int = 0o777, **options: int) -> int:
        descriptor = opened(path, flags, mode, **options)
        if flags & os.O_CREAT and ".tp-" in str(path):
            made.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    os.open = watched  # type: ignore[assignment]
    try:
        presplit(plan, model, tmp_path / "shards")
    finally:
        os.open = opened
    assert made and set(made) == {0o600}
    found = modes(tmp_path / "shards")
    assert {name: mode for name, mode in found.items() if name.endswith(".safetensors")} == {
        name: 0o600 for name in found if name.endswith(".safetensors")
    }
    assert found[MANIFEST_NAME] == found[PLAN_NAME] == 0o600, "they hold its header"
    assert (found["tokenizer.json"], found["config.json"]) == (0o640, 0o644)
    merge(tmp_path / "shards", tmp_path / "merged")
    found = modes(tmp_path / "merged")
    assert found["model-00001-of-00002.safetensors"] == 0o600
    assert (found["tokenizer.json"], found["config.json"]) == (0o640, 0o644)
    reshard(tmp_path / "shards", tmp_path / "four", tp_size=4)
    found = modes(tmp_path / "four")
    assert {mode for name, mode in found.items() if name.startswith("tp-")} == {0o600}
    assert (found["tokenizer.json"], found["config.json"]) == (0o640, 0o644)


def test_shards_of_public_files_are_as_the_umask_says(model: Path, tmp_path: Path) -> None:
    plan = compile_plan(model, tp_size=2)
    for path in model.iterdir():
        path.chmod(0o444)
    presplit(plan, model, tmp_path / "shards")
    assert set(modes(tmp_path / "shards").values()) == {0o644}, "who owns a file may write it"
    os.umask(0o077)
    presplit(plan, model, tmp_path / "private")
    assert set(modes(tmp_path / "private").values()) == {0o600}


def presplit_notes(model: Path, output: Path) -> list[str]:
    notes: list[str] = []
    presplit(compile_plan(model, tp_size=2), model, output, notes=notes.append)
    return notes


def test_a_link_to_what_is_elsewhere_is_not_followed_and_named(model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "home" / "secret"
    secret.parent.mkdir()
    secret.write_text("secret")
    secret.chmod(0o600)
    (model / "README.txt").symlink_to(secret)
    (model / "inside.txt").symlink_to("tokenizer.json")
    (model / "nowhere").symlink_to("absent")
    (note,) = presplit_notes(model, tmp_path / "shards")
    assert (
        "README.txt (a link that leads out of the checkpoint" in note and "nowhere (a link that leads nowhere)" in note
    )
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "shards").iterdir())
    assert (tmp_path / "shards" / "inside.txt").read_text() == "{}"


def test_the_cache_of_the_hub_is_made_of_links_and_nothing_is_said(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert presplit_notes(snapshot, tmp_path / "shards") == []
    assert (tmp_path / "shards" / "tokenizer.json").read_text() == "{}"


def test_a_folder_of_links_to_another_checkpoint_is_followed_and_said(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    (note,) = presplit_notes(folder, tmp_path / "shards")
    assert note.startswith("links that lead out of the checkpoint were followed: ")
    assert (tmp_path / "shards" / "tokenizer.json").read_text() == "{}"


def test_what_is_left_out_is_named_in_one_line(model: Path, tmp_path: Path) -> None:
    for name in (
        ".hidden",
        "training_args.bin",
        "consolidated.safetensors",
        "x.index.json",
        "a\nb",
        "a\\b",
        MANIFEST_NAME,
    ):
        (model / name).write_text("x")
    os.close(os.open(os.fsencode(model) + b"/not-utf8-\xff", os.O_CREAT | os.O_WRONLY))
    (model / "folder").mkdir()
    os.mkfifo(model / "pipe")
    plan = tmp_path / "plan.json"
    plan.write_text(compile_plan(model, tp_size=2).to_json())
    command = ["presplit", str(plan), "--checkpoint", str(model), "-o"]
    result = CliRunner().invoke(main, [*command, str(tmp_path / "shards")])
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.stderr.splitlines() if "not copied" in line)
    for said in (
        ".hidden (hidden)",
        "consolidated.safetensors, training_args.bin (weights that the model is not read from)",
        "x.index.json (an index of such weights)",
        "(a name that a manifest cannot hold)",
        "folder (a folder)",
        "pipe (no plain file)",
        "(a name that shards need themselves)",
    ):
        assert said in line, line
    result = CliRunner().invoke(main, [*command, str(tmp_path / "quiet"), "--quiet"])
    assert (result.exit_code, result.stderr) == (0, "")
