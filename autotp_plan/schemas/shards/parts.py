"""Parts of a shards folder that several processes write, and what their hidden files in the folder say.

While part 3 of 8 is written, the folder holds its journal; when it is complete, a record of its files in place of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autotp_plan.schemas.errors import Fault, OptionError
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME
from autotp_plan.schemas.shards.output_file import short_name

MAX_PARTS = 10_000
RECORD_NAME = ".autotp-complete"
_HIDDEN = re.compile(
    rf"(?:({re.escape(JOURNAL_NAME)})|({re.escape(RECORD_NAME)})|\..+)\.([1-9]\d*)-of-([1-9]\d*)(?:\.[0-9a-f]{{8}}\.tmp)?"
)


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number`, from 1, of `count`."""

    number: int
    count: int

    @classmethod
    def checked(cls, number: int, count: int) -> Part:
        """The part. Raises OptionError when there is no such part."""
        if not 1 <= number <= count <= MAX_PARTS:
            raise OptionError(_no_such_part(f"part {number} of {count}"))
        return cls(number, count)

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that `3/8` means. Raises OptionError when it means none."""
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if match is None:
            raise OptionError(_no_such_part(repr(text)))
        return cls.checked(int(match[1]), int(match[2]))

    @property
    def journal_name(self) -> str:
        """The file that is locked while the part is written, and holds what is complete of it."""
        return f"{JOURNAL_NAME}.{self._suffix}"

    @property
    def record_name(self) -> str:
        """The file that says that the part is complete."""
        return f"{RECORD_NAME}.{self._suffix}"

    def temporary_name(self, name: str, token: str) -> str:
        """The name of a file while a writer of the part writes it; `token` is 8 hexadecimal digits of the writer."""
        return f".{short_name(name)}.{self._suffix}.{token}.tmp"

    @property
    def _suffix(self) -> str:
        return f"{self.number}-of-{self.count}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PartsFound:
    """How far a folder is that is written in `count` parts: `complete` and `begun` are numbers of parts."""

    count: int
    complete: frozenset[int]
    begun: frozenset[int]

    @property
    def missing(self) -> list[int]:
        """The parts that are not complete."""
        return [number for number in range(1, self.count + 1) if number not in self.complete]

    def __str__(self) -> str:
        """`5 of 8 parts are complete, 2 is begun, 3 and 7 are not`."""
        rest = [number for number in self.missing if number not in self.begun]
        begun = [number for number in self.missing if number in self.begun]
        words = [f"{len(self.complete)} of {self.count} parts are complete"]
        words += [f"{listed(begun)} {'is' if len(begun) == 1 else 'are'} begun"] if begun else []
        words += [f"{listed(rest)} {'is' if len(rest) == 1 else 'are'} not begun"] if rest else []
        return ", ".join(words)


def listed(numbers: Sequence[int], most: int = 20) -> str:
    """`1, 2 and 5`; of many the first, and how many more there are."""
    shown = [str(number) for number in numbers[:most]]
    if len(numbers) > most:
        return f"{', '.join(shown)} and {len(numbers) - most} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))


def part_of(name: str) -> Part | None:
    """The part that a file of the folder is the journal, the record or a temporary file of; None for other files."""
    match = _HIDDEN.fullmatch(name)
    kind_fits = match is not None and (match[1] or match[2] or name.endswith(".tmp"))
    return Part(int(match[3]), int(match[4])) if match is not None and kind_fits else None


def find_parts(folder: Path) -> PartsFound | None:
    """How far a folder is that is written in parts; None for any other, and where there is none."""
    names = set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208
    parts = {part for name in names if (part := part_of(name)) is not None}
    if not parts:
        return None
    return PartsFound(
        count=max(part.count for part in parts),
        complete=frozenset(part.number for part in parts if part.record_name in names),
        begun=frozenset(part.number for part in parts),
    )


def remove_part_files(folder: Path) -> None:
    """Remove journals, records and temporary files of all parts. Raises OSError."""
    for name in os.listdir(folder):  # noqa: PTH208
        if part_of(name) is not None:
            (folder / name).unlink(missing_ok=True)


def balanced(sizes: Sequence[int], count: int) -> list[int]:
    """For each file the part that writes it, from 0: files of one part are neighbours, and the largest part is small.

    Args:
        sizes: of the files, in bytes.
        count: how many parts there are.
    """
    low, high = max(sizes, default=0), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if max(_filled(sizes, count, middle), default=0) < count:
            high = middle
        else:
            low = middle + 1
    return list(_filled(sizes, count, low))


def _filled(sizes: Sequence[int], count: int, most: int) -> Iterable[int]:
    """Parts of at most `most` bytes, as many as it takes; while there are files enough, no part is left empty."""
    part = filled = 0
    for index, size in enumerate(sizes):
        left = len(sizes) - index
        if index and (filled + size > most or left <= count - 1 - part):
            part, filled = part + 1, 0
        filled += size
        yield part


def _no_such_part(got: str) -> Fault:
    return Fault(
        code="no-such-part",
        what="there is no such part",
        where="--part",
        got=got,
        expected=f"K/N, with K from 1 to N, and N at most {MAX_PARTS}",
        next="give --part 1/8 to --part 8/8, each once",
    )
