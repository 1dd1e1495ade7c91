"""Text to train on: what cannot be read, or is too short, is an error of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autotp_plan.runtime.data.text import TokenDataset, text_tokens
from autotp_plan.schemas.errors import DataError


class Letters:
    """A tokenizer of one token per letter."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_files_of_a_folder_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("c")
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    assert text_tokens(tmp_path, Letters()).tolist() == [97, 98, 0, 99, 0], "what is no text is left out"
    assert text_tokens(tmp_path, Letters(), limit=2).tolist() == [97, 98]


def test_text_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the training text cannot be read"):
        text_tokens(tmp_path / "missing.txt", Letters())
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
    with pytest.raises(DataError, match="bytes that are not UTF-8"):
        text_tokens(tmp_path / "latin.txt", Letters())
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert text_tokens(tmp_path, Letters()).tolist() == []


def test_text_that_is_too_short() -> None:
    with pytest.raises(DataError, match="the text is too short to train on") as caught:
        TokenDataset(torch.arange(7), 8)
    assert "7 tokens" in str(caught.value)
    assert len(TokenDataset(torch.arange(17), 8)) == 2, "what is left over is not used"
