"""What a disk may hold when the power goes, from a log of writes, syncs and names.

The model is that of a file system with a journal of names, such as ext4: of the changes of names in a folder the disk
has the first ones, at least up to that folder's last sync; of the bytes of a file it has those of its last sync, and of
what was written since anything or nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

_HEAD = struct.Struct("5q")
OPEN, WRITE, SYNC, RENAME, UNLINK, MKDIR, RMDIR, TRUNCATE, READ, MARK = range(1, 11)
PAGE = 4096


@dataclass(slots=True)
class _File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    number: int = 0


@dataclass(slots=True)
class _Folder:
    """Its names now, and each state of its names since its last sync, that one first."""

    names: dict[str, _File | _Folder] = field(default_factory=dict)
    states: list[dict[str, _File | _Folder]] = field(default_factory=list)

    def changed(self) -> None:
        self.states.append(dict(self.names))


@dataclass(frozen=True, slots=True)
class Event:
    """A change that was logged."""

    kind: int
    path: str
    other: str
    at: int
    data: bytes


def events(log: Path) -> Iterator[Event]:
    """What a log holds; its end may be missing, where a process was killed."""
    content = log.read_bytes()
    at = 0
    while at + _HEAD.size <= len(content):
        kind, position, first, second, size = _HEAD.unpack_from(content, at)
        at += _HEAD.size
        path, other = content[at : at + first].decode(), content[at + first : at + first + second].decode()
        at += first + second
        yield Event(kind, path, other, position, content[at : at + size])
        at += size


class Disk:
    """The files below a folder, as processes see them and as the disk has them.

    Args:
        root: the folder. What is in it now is on the disk.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = _read(root)
        self.numbers: dict[int, tuple[str, _File]] = {}

    def apply(self, event: Event) -> None:
        """Make a change that was logged."""
        if event.kind == MKDIR:
            self._name(event.path, _Folder(states=[{}])).changed()
        elif event.kind == OPEN:
            self._open(event)
        elif event.kind in (WRITE, TRUNCATE, SYNC):
            self._change(event)
        elif event.kind in (UNLINK, RMDIR):
            self._name(event.path, None).changed()
        elif event.kind == RENAME:
            moved = self._find(event.path)
            before, after = self._name(event.path, None), self._name(event.other, moved)
            after.changed()
            if before is not after:
                before.changed()

    def _open(self, event: Event) -> None:
        found = self._find(event.path)
        if found is None or (isinstance(found, _File) and found.number not in (0, event.at)):
            found = _File()  # or the name of a file that has another name by now
            self._name(event.path, found).changed()
        if isinstance(found, _File):
            found.number = event.at
            self.numbers[event.at] = (event.path, found)
            if event.other:
                del found.data[:]

    def _change(self, event: Event) -> None:
        found = self._find(event.path)
        if found is None and event.kind == SYNC and event.at in self.numbers:  # renamed by a call that is not seen
            before, found = self.numbers[event.at]
            if self._find(before) is found:
                self._name(before, None)
            self._name(event.path, found).changed()
        if isinstance(found, _Folder):
            found.states = [dict(found.names)]
        elif found is not None and event.kind == SYNC:
            found.synced = bytes(found.data)
        elif found is not None:
            end = event.at + len(event.data)
            found.data.extend(bytes(max(0, end - len(found.data))))
            if event.kind == TRUNCATE:
                del found.data[event.at :]
            else:
                found.data[event.at : end] = event.data

    def _find(self, path: str) -> _File | _Folder | None:
        found: _File | _Folder | None = self.top
        for name in Path(path).relative_to(self.root).parts:
            found = found.names.get(name) if isinstance(found, _Folder) else None
        return found

    def _name(self, path: str, value: _File | _Folder | None) -> _Folder:
        """Give a name to something, or remove the name; returns the folder."""
        parent = self._find(str(Path(path).parent))
        assert isinstance(parent, _Folder), path
        if value is None:
            parent.names.pop(Path(path).name, None)
        else:
            parent.names[Path(path).name] = value
        return parent

    def write(self, target: Path, how: str, random: Random) -> None:
        """Write to `target` what the disk may have.

        Args:
            target: a new folder.
            how: `all` (nothing is lost, as when processes are killed), `synced` (nothing but what was synced), `names`
                (all names, and the bytes that were synced), `random` (anything that is legal).
            random: what decides.
        """
        _write(self.top, target, how, random)


def _read(folder: Path) -> _Folder:
    names: dict[str, _File | _Folder] = {}
    for path in folder.iterdir():
        data = b"" if path.is_dir() else path.read_bytes()
        names[path.name] = _read(path) if path.is_dir() else _File(bytearray(data), data)
    return _Folder(names, [dict(names)])


def _write(folder: _Folder, target: Path, how: str, random: Random) -> None:
    target.mkdir()
    states = folder.states
    names = {"all": folder.names, "names": folder.names, "synced": states[0], "random": random.choice(states)}[how]
    for name, found in names.items():
        if isinstance(found, _Folder):
            _write(found, target / name, how, random)
        else:
            data = {"all": bytes(found.data), "names": found.synced, "synced": found.synced}.get(how)
            (target / name).write_bytes(_some_of(found, random) if data is None else data)


def _some_of(file: _File, random: Random) -> bytes:
    """Of the pages that were written since the last sync some, and any length in between."""
    now, before = bytes(file.data), file.synced
    if now == before:
        return now
    choice = random.randrange(4)
    if choice == 0:
        return before
    if choice == 1:
        return now[: random.randrange(len(now) + 1)] if len(now) > len(before) else now
    size = max(len(now), len(before))
    pages = bytearray()
    for at in range(0, size, PAGE):
        source = now if random.random() < 0.5 else before
        pages += source[at : at + PAGE].ljust(min(PAGE, size - at), b"\0")
    return bytes(pages)


def mark(log: Path, what: str) -> None:
    """Note in a log that something has happened, such as that a save has returned."""
    with open(log, "ab") as file:
        file.write(_HEAD.pack(MARK, 0, len(what), 0, 0) + what.encode())
