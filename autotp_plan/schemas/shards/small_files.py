"""Which files of a checkpoint are copied as they are, and which are left out and why.

A link is followed into the checkpoint's folder, and into the folders where its weights and config really lie: so
are the hub's cache, and a folder of links to another checkpoint. Any other link might lead to what is private.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from autotp_plan.schemas.names import some
from autotp_plan.schemas.shards.manifest import INDEX_COPY_NAME, MANIFEST_NAME, PLAN_NAME
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint
from autotp_plan.schemas.storage.files import File, file_size, local_files

MAX_COPIED_BYTES = 256 * 1024 * 1024
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".pkl", ".pickle", ".joblib")
_OURS = (MANIFEST_NAME, PLAN_NAME, INDEX_COPY_NAME)


class CopiedFile(NamedTuple):
    """A file that is copied as it is: its name in a shards folder, where it lies now, and its size in bytes."""

    name: str
    path: File
    size: int


class SmallFiles(NamedTuple):
    """The files that are copied; why others are left out, by name; and the links that lead out of the folder."""

    copied: tuple[CopiedFile, ...]
    left_out: Mapping[str, str]
    followed: tuple[str, ...]

    def notes(self) -> Iterator[str]:
        """What a user should know: at most a sentence for each of the two."""
        if self.left_out:
            names: dict[str, list[str]] = defaultdict(list)
            for name, why in self.left_out.items():
                names[why].append(name)
            yield "not copied: " + "; ".join(f"{some(of)} ({why})" for why, of in names.items())
        if self.followed:
            yield f"links that lead out of the checkpoint were followed: {some(self.followed)}"


def small_files(checkpoint: Checkpoint) -> SmallFiles:
    """The index, and all small files that hold no weights (config, tokenizer, generation), in name order.

    Raises:
        OSError: the folder cannot be read.
    """
    folder = checkpoint.folder
    read = {path.name: path for file in checkpoint.files for path in local_files(file.path)}
    decisive = [*read.values(), folder / CONFIG_NAME, folder / INDEX_NAME]
    homes = {folder.resolve(), *(path.resolve().parent for path in decisive if path.exists())}
    copied: list[CopiedFile] = []
    left_out: dict[str, str] = {}
    followed = [name for name, path in read.items() if _leads_out(path)]
    if checkpoint.index is not None:
        copied.append(CopiedFile(INDEX_COPY_NAME, checkpoint.index, file_size(checkpoint.index)))
    for path in sorted(folder.iterdir()):
        why = _why_left_out(path, homes)
        if path.name == CONFIG_NAME and checkpoint.config_file is not None:
            copied.append(CopiedFile(CONFIG_NAME, checkpoint.config_file, file_size(checkpoint.config_file)))
        elif why is None:
            copied.append(CopiedFile(path.name, path, path.stat().st_size))
            followed += [path.name] if _leads_out(path) else []
        elif path.name not in read and path.name != getattr(checkpoint.index, "name", None):
            left_out[path.name] = why
    return SmallFiles(tuple(copied), left_out, tuple(followed))


def is_copied(name: str, size: int) -> bool:
    """Whether a file of a checkpoint is copied as it is: it holds no weights, and is not large."""
    return _why_not(name, size) is None


def is_weights(name: str) -> bool:
    """Whether a file holds weights, by its name."""
    return Path(name).suffix in _WEIGHTS


def _why_left_out(path: Path, homes: Collection[Path]) -> str | None:
    """Why a file is not copied; None for one that is."""
    if path.is_dir():
        return "a folder"
    if not path.exists():
        return "a link that leads nowhere"
    if not path.is_file():
        return "no plain file"
    why = _why_not(path.name, path.stat().st_size)
    if why is None and path.is_symlink() and not _is_in(path.resolve(), homes):
        return "a link that leads out of the checkpoint: put the file in its place to have it copied"
    return why


def _why_not(name: str, size: int) -> str | None:
    if name.startswith("."):
        return "hidden"
    if not name.isprintable() or "\\" in name:
        return "a name that a manifest cannot hold"
    if is_weights(name):
        return "weights that the model is not read from"
    if name.endswith(".index.json"):
        return "an index of such weights"
    if name in _OURS:
        return "a name that shards need themselves"
    return f"larger than {MAX_COPIED_BYTES // 1024**2} MiB" if size > MAX_COPIED_BYTES else None


def _is_in(path: Path, homes: Collection[Path]) -> bool:
    return any(home == path.parent or home in path.parents for home in homes)


def _leads_out(path: Path) -> bool:
    """Whether a file is a link out of its folder, other than those of the hub's cache."""
    if not path.is_symlink():
        return False
    folder, real = path.parent.resolve(), path.resolve()
    in_hub_cache = real.parent.name == "blobs" and real.parent.parent / "snapshots" in folder.parents
    return folder not in real.parents and not in_hub_cache
