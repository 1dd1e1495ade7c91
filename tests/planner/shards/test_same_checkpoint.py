"""`check SHARDS --checkpoint CHECKPOINT` compares every byte, and names what differs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from autotp_plan.planner import check_shards, compile_plan, presplit
from autotp_plan.planner.cli.main import main
from autotp_plan.schemas.errors import AutoTPError
from autotp_plan.schemas.storage.safetensors_header import read_header
from tests.helpers.checkpoints import write_llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_llama(tmp_path / "model", num_files=2, vocab_size=512)
    (folder / "chat_template.jinja").write_text("old template")
    presplit(compile_plan(folder, tp_size=2), folder, tmp_path / "shards")
    return folder


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_each_tensor_is_compared_and_named(model: Path, tmp_path: Path) -> None:
    """The first and the last byte of each tensor in turn, which the fingerprint has no sample of where it is large."""
    status, text = run("check", tmp_path / "shards", "--checkpoint", model)
    assert status == 0 and f"every byte is that of {model} (21 tensors and 3 small files" in text
    for path in model.glob("*.safetensors"):
        for tensor in read_header(path).tensors:
            for at in (tensor.start, tensor.stop - 1):
                flip(path, at)
                with pytest.raises(AutoTPError) as caught:
                    check_shards(tmp_path / "shards", checkpoint=model)
                assert [fault.where for fault in caught.value.faults] == [tensor.name]
                flip(path, at)
    check_shards(tmp_path / "shards", checkpoint=model)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "chat_template.jinja": (lambda folder: (folder / "chat_template.jinja").write_text("new template"), "other bytes"),
    "notes.md": (lambda folder: (folder / "notes.md").write_text("mine"), "no such file"),
    "config.json": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json")
            .read_text()
            .replace('"tie_word_embeddings": false', '"tie_word_embeddings": false ')
        ),
        "bytes",
    ),
    "model-00001-of-00002.safetensors": (
        lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(
            (folder / "model-00001-of-00002.safetensors").read_bytes().replace(b'"format":"pt"', b'"format":"tp"')
        ),
        "other headers",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_small_files_and_headers_are_compared(model: Path, tmp_path: Path, name: str) -> None:
    change, got = CHANGES[name]
    change(model)
    status, text = run("check", tmp_path / "shards", "--checkpoint", model)
    assert status == 2 and name in text and got in text, text
    status, text = run("check", tmp_path / "shards", "--checkpoint", model, "--quick")
    assert status == 0 and "names, shapes, dtypes and config.json, and no bytes" in text


def test_a_copy_is_the_same_and_progress_is_told(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    told: list[tuple[int, int]] = []
    check_shards(
        tmp_path / "shards", checkpoint=tmp_path / "elsewhere", progress=lambda done, total: told.append((done, total))
    )
    size = sum(path.stat().st_size for path in model.iterdir())
    headers = sum(8 + len(read_header(path).header) for path in model.glob("*.safetensors"))
    assert told[-1] == (size - headers, size - headers)
