"""The manifest of a shards folder: each file's size and checksum, the plan they were cut by, and the source's headers.

The manifest is written last: a folder without one is not finished, and holds a journal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import DocumentError, Fault

MANIFEST_NAME = "autotp_shards.json"
PLAN_NAME = "autotp_plan.json"
INDEX_COPY_NAME = "autotp_source_index.json"
JOURNAL_NAME = ".autotp-unfinished"
FORMAT = "autotp-shards"
VERSION = "2.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """A file of the folder.

    `rank` is a TP rank, None for tensors that every rank reads, absent (-1) for other files; `unused` marks tensors
    that no rank reads, kept for the checkpoint to be put together again.
    """

    name: str
    size: int
    crc32: str
    rank: int | None = -1
    unused: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardFile:
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"name": self.name, "size": self.size, "crc32": self.crc32}
        if self.rank != -1:
            data["rank"] = self.rank
        return {**data, "unused": True} if self.unused else data


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One safetensors file of the original checkpoint: the JSON text of its header, to the byte."""

    name: str
    header: str

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SourceFile:
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "header": self.header}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The checkpoint that was cut. `fingerprint` tells it from others of the same names and shapes."""

    fingerprint: str
    files: tuple[SourceFile, ...]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Source:
        return cls(fingerprint=data["fingerprint"], files=tuple(SourceFile.from_dict(entry) for entry in data["files"]))

    def to_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "files": [file.to_dict() for file in self.files]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a shards folder holds."""

    plan: str
    tp_size: int
    files: tuple[ShardFile, ...]
    source: Source
    version: str = VERSION

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of `folder`. Raises DocumentError with every fault found."""
        return cls.from_dict(documents.read_json(folder / MANIFEST_NAME, "shards manifest"))

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, str) and version.split(".")[0] != VERSION.split(".")[0]:
            raise DocumentError(
                Fault(
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
                    what="the shards manifest was changed after it was written",
                    where="fingerprint",
                    got=data["fingerprint"],
                    expected=stated,
                    next="copy the folder again, or pre-split again",
                )
            )
        return cls(
            plan=data["plan"],
            tp_size=data["tp_size"],
            files=tuple(ShardFile.from_dict(entry) for entry in data["files"]),
            source=Source.from_dict(data["source"]),
            version=data["version"],
        )

    def to_dict(self) -> dict[str, Any]:
        data = {
            "format": FORMAT,
            "version": self.version,
            "plan": self.plan,
            "tp_size": self.tp_size,
            "files": [file.to_dict() for file in self.files],
            "source": self.source.to_dict(),
        }
        return {**data, "fingerprint": documents.fingerprint(data)}

    def to_json(self) -> str:
        """The text of the manifest: the same folder gives the same bytes."""
        return documents.format_json(self.to_dict())


def shard_file_name(owner: str, part: int, num_parts: int) -> str:
    """`tp-00-of-02.00001-of-00003.safetensors`: the owner's part."""
    return f"{owner}.{part + 1:05d}-of-{num_parts:05d}.safetensors"


def owner_name(tp_rank: int | None, tp_size: int) -> str:
    """`tp-00-of-02` for a rank's tensors, `shared` for those that every rank reads."""
    return "shared" if tp_rank is None else f"tp-{tp_rank:02d}-of-{tp_size:02d}"
