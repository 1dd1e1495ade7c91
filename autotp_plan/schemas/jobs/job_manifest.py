"""The manifest of one checkpoint of a job: which mesh it was saved on, and the size and checksum of every file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.schemas import documents
from autotp_plan.schemas.codec import decode, encode
from autotp_plan.schemas.errors import DocumentError, Fault

FORMAT = "autotp-checkpoint"
VERSION = "1.0"
ABOUT_NAME = "autotp_checkpoint.json"
PLAN_NAME = "autotp_plan.json"
LATEST_NAME = "latest"
UNFINISHED_NAME = "autotp_unfinished"
"""A file that a save makes first and removes last: a folder that holds it, and that is not the latest, may be removed.

The folder is complete when it holds `ABOUT_NAME`, which is written when the files of all ranks are on disk.
"""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class JobFile:
    """A file of the checkpoint: its path inside of the folder, its bytes, their CRC-32 as text, and who wrote it."""

    name: str
    size: int
    crc32: str
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class JobManifest:
    """What a checkpoint of a job holds.

    Attributes:
        plan: the fingerprint of the job's plan.
        tp_size: number of TP ranks.
        dp_size: number of DP ranks.
        zero_stage: ZeRO stage.
        position: epoch, and samples of it that all DP ranks together have seen; None where the job reads data itself.
        step: optimizer steps taken.
        this_mesh_only: why it can be resumed only on the mesh it was saved on; empty where it can be on others.
        client_state: the keys of the caller's own state.
        files: every other file of the folder; empty in checkpoints from before there were checksums.
    """

    plan: str
    tp_size: int
    dp_size: int
    zero_stage: int
    position: tuple[int, int] | None
    step: int = 0
    this_mesh_only: str | None = ""
    client_state: tuple[str, ...]
    files: tuple[JobFile, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> JobManifest:
        """The manifest in the folder of a tag.

        Raises:
            DocumentError: it is missing, no manifest of a job, or was changed after it was written.
        """
        path = folder / ABOUT_NAME
        data = documents.read_json(path, "job's manifest", plain=True)
        documents.validate(data, "job", "job's manifest")
        version = data.get("version", VERSION)
        stated = documents.fingerprint({key: value for key, value in data.items() if key != "fingerprint"})
        if version.split(".")[0] != VERSION.split(".")[0]:
            raise DocumentError(_fault("of another format version", path, version, f"{VERSION.split('.')[0]}.x"))
        if stated != data.get("fingerprint", stated):
            raise DocumentError(_fault("changed after it was written", path, data["fingerprint"], stated))
        return decode(
            cls, {key: value for key, value in data.items() if key not in ("format", "version", "fingerprint")}
        )

    def to_json(self) -> str:
        """The text of the manifest."""
        always: dict[str, Any] = {"step": self.step, "this_mesh_only": self.this_mesh_only, "files": []}
        data: dict[str, Any] = {"format": FORMAT, "version": VERSION, **always, **encode(self)}
        return documents.format_json({**data, "fingerprint": documents.fingerprint(data)})


def _fault(what: str, path: Path, got: str, expected: str) -> Fault:
    return Fault(
        code="job-manifest",
        what=f"the job's manifest is {what}",
        where=str(path),
        got=got,
        expected=expected,
        next="resume from another checkpoint: `autotp-plan check` of the job's folder lists those that are sound",
    )
