"""Tokens to train on, from text files or made up, and the windows that a model is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from autotp_plan.schemas.errors import DataError, Fault


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Consecutive windows of tokens, as `input_ids` and `labels`, both `(seq_length,)` int64.

    Args:
        tokens: `(tokens,)` int64; what is left over after the last full window is not used.
        seq_length: tokens per window.

    Raises:
        DataError: there are fewer tokens than one window has.
    """

    def __init__(self, tokens: Tensor, seq_length: int) -> None:
        if len(tokens) < seq_length:
            raise DataError(
                Fault(
                    what="the text is too short to train on",
                    where="--data",
                    got=f"{len(tokens)} tokens",
                    expected=f"at least one window of {seq_length} tokens",
                    next="give more text, or a smaller --seq-length",
                )
            )
        self.windows = tokens[: len(tokens) // seq_length * seq_length].view(-1, seq_length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def text_tokens(path: Path, tokenizer: Any, limit: int | None = None) -> Tensor:
    """The tokens of a text file, or of all the files under a folder in name order.

    Args:
        path: a file in UTF-8, or a folder; files of a folder that are not UTF-8 are left out.
        tokenizer: a transformers tokenizer.
        limit: stop reading when there are that many tokens.

    Returns:
        `(tokens,)` int64. After each file comes the tokenizer's end-of-text token, where it has one.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    tokens: list[int] = []
    for file in files:
        text = _text(file, may_be_binary=path.is_dir())
        if text:
            tokens.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if tokenizer.eos_token_id is not None:
                tokens.append(tokenizer.eos_token_id)
        if limit is not None and len(tokens) >= limit:
            break
    return torch.tensor(tokens[:limit], dtype=torch.long)


def synthetic_tokens(vocab_size: int, count: int, seed: int = 0) -> Tensor:
    """Random token ids below `vocab_size`, `(count,)` int64, the same for the same seed."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def _text(file: Path, may_be_binary: bool) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if may_be_binary and isinstance(error, UnicodeDecodeError):
            return ""
        raise DataError(
            Fault(
                what="the training text cannot be read",
                where=str(file),
                got=getattr(error, "strerror", None) or "bytes that are not UTF-8",
                expected="a text file in UTF-8, or a folder of such files",
                next="correct the path given with --data",
            )
        ) from None
