"""The manifest of a shards folder: each file's size and checksum, the plan of the shards, and the source's headers.

The manifest is written last: a folder without one is not finished, and holds a journal.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.schemas import documents
from autotp_plan.schemas.codec import decode, encode
from autotp_plan.schemas.errors import DocumentError, Fault

MANIFEST_NAME = "autotp_shards.json"
PLAN_NAME = "autotp_plan.json"
INDEX_COPY_NAME = "autotp_source_index.json"
JOURNAL_NAME = ".autotp-unfinished"
FORMAT = "autotp-shards"
VERSION = "2.0"


class Owner(enum.Enum):
    """Who reads the tensors of a file, where it is not one TP rank. The value is what the file's header says."""

    ALL_RANKS = "all"
    NO_RANK = "none"
    """Tensors of the checkpoint that are kept for `merge`."""


FileOwner = int | Owner | None
"""The TP rank that reads the tensors of a file, or an `Owner`; None for a file without tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """A file of the folder: its size in bytes, its CRC-32 as eight hexadecimal digits, and who reads its tensors."""

    name: str
    size: int
    crc32: str
    owner: FileOwner = None

    @classmethod
    def from_value(cls, data: dict[str, Any]) -> ShardFile:
        """The entry that a manifest holds: `rank` is null for tensors of all ranks, and absent where no rank reads."""
        owner: FileOwner = None
        if data.get("unused"):
            owner = Owner.NO_RANK
        elif "rank" in data:
            owner = Owner.ALL_RANKS if data["rank"] is None else data["rank"]
        return cls(name=data["name"], size=data["size"], crc32=data["crc32"], owner=owner)

    def to_value(self) -> dict[str, Any]:
        """The entry that a manifest holds."""
        data: dict[str, Any] = {"name": self.name, "size": self.size, "crc32": self.crc32}
        if self.owner is Owner.NO_RANK:
            return {**data, "unused": True}
        if self.owner is not None:
            data["rank"] = None if self.owner is Owner.ALL_RANKS else self.owner
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One safetensors file of the original checkpoint: the JSON text of its header, to the byte."""

    name: str
    header: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The original checkpoint. `fingerprint` tells it from others of the same names and shapes."""

    fingerprint: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a shards folder holds: `plan` is the fingerprint of its plan."""

    version: str = VERSION
    plan: str
    tp_size: int
    files: tuple[ShardFile, ...]
    source: Source

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a shards folder.

        Raises:
            DocumentError: with every fault found.
        """
        return cls.from_dict(documents.read_json(folder / MANIFEST_NAME, "shards manifest", plain=True))

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """The manifest that the JSON value `data` is.

        Raises:
            DocumentError: another format version, a breach of the schema, or a wrong fingerprint.
        """
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, str) and version.split(".")[0] != VERSION.split(".")[0]:
            raise DocumentError(
                Fault(
                    code="shards-version",
                    what="the shards are of another format version",
                    where="version",
                    got=version,
                    expected=f"{VERSION.split('.')[0]}.x",
                    next="pre-split again with this version of autotp-plan",
                )
            )
        documents.validate(data, "shards", "shards manifest")
        stated = documents.fingerprint({key: value for key, value in data.items() if key != "fingerprint"})
        if stated != data["fingerprint"]:
            raise DocumentError(
                Fault(
                    code="manifest-fingerprint",
                    what="the shards manifest was changed after it was written",
                    where="fingerprint",
                    got=data["fingerprint"],
                    expected=stated,
                    next="copy the folder again, or pre-split again",
                )
            )
        return decode(cls, {key: value for key, value in data.items() if key not in ("format", "fingerprint")})

    def to_dict(self) -> dict[str, Any]:
        """The JSON value of the manifest, fingerprint included."""
        data = {"format": FORMAT, "version": self.version, **encode(self)}
        return {**data, "fingerprint": documents.fingerprint(data)}

    def to_json(self) -> str:
        """The text of the manifest: the same folder gives the same bytes."""
        return documents.format_json(self.to_dict())


def shard_file_name(owner: int | Owner, tp_size: int, part: int, num_parts: int) -> str:
    """The name of a file of tensors, such as `tp-00-of-02.00001-of-00003.safetensors`.

    Args:
        owner: who reads its tensors.
        tp_size: number of TP ranks.
        part: which of the owner's files it is, from 0.
        num_parts: how many files the owner has.
    """
    if owner is Owner.ALL_RANKS:
        name = "shared"
    elif owner is Owner.NO_RANK:
        name = "unused"
    else:
        name = f"tp-{owner:02d}-of-{tp_size:02d}"
    return f"{name}.{part + 1:05d}-of-{num_parts:05d}.safetensors"


def owner_text(owner: FileOwner) -> str:
    """An owner as the header of a file says it: a rank, `all` or `none`."""
    return owner.value if isinstance(owner, Owner) else str(owner)
