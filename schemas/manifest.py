"""The manifest of a shards folder: each file's size and checksum, and the plan they were cut by.

The manifest is written last: a folder without one is not finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import DocumentError, Fault

MANIFEST_NAME = "autotp_shards.json"
PLAN_NAME = "autotp_plan.json"
FORMAT = "autotp-shards"
VERSION = "1.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """A file of the folder. `rank` is a TP rank, None for tensors every rank reads, absent (-1) for other files."""

    name: str
    size: int
    sha256: str
    rank: int | None = -1

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardFile:
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"name": self.name, "size": self.size, "sha256": self.sha256}
        return data if self.rank == -1 else {**data, "rank": self.rank}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One safetensors file of the original checkpoint: its tensors in the order of their bytes, its metadata."""

    name: str
    tensors: tuple[str, ...]
    metadata: dict[str, str] | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SourceFile:
        return cls(name=data["name"], tensors=tuple(data["tensors"]), metadata=data.get("metadata"))

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"name": self.name}
        if self.metadata is not None:
            data["metadata"] = self.metadata
        return {**data, "tensors": list(self.tensors)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a shards folder holds."""

    plan: str
    tp_size: int
    files: tuple[ShardFile, ...]
    source: tuple[SourceFile, ...] = ()
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
        return cls(
            plan=data["plan"],
            tp_size=data["tp_size"],
            files=tuple(ShardFile.from_dict(entry) for entry in data["files"]),
            source=tuple(SourceFile.from_dict(entry) for entry in data.get("source", {}).get("files", ())),
            version=data["version"],
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": self.version,
            "plan": self.plan,
            "tp_size": self.tp_size,
            "files": [file.to_dict() for file in self.files],
            "source": {"files": [file.to_dict() for file in self.source]},
        }

    def to_json(self) -> str:
        """The text of the manifest: the same folder gives the same bytes."""
        return documents.format_json(self.to_dict())


def rank_file_name(tp_rank: int | None, tp_size: int, part: int, num_parts: int) -> str:
    """`tp-00-of-02.00001-of-00003.safetensors` for a rank's tensors, `shared.…` for those that every rank reads."""
    owner = "shared" if tp_rank is None else f"tp-{tp_rank:02d}-of-{tp_size:02d}"
    return f"{owner}.{part + 1:05d}-of-{num_parts:05d}.safetensors"
