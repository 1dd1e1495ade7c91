"""Every error that autotp-plan raises on purpose.

    AutoTPError                 one or more faults in what the user gave us
    +-- DocumentError           a plan, spec or manifest that is not what its schema says
    +-- CompileError            specs, model and tp_size do not make a plan
    +-- CheckpointError         a checkpoint folder or safetensors file that cannot be read, or lacks a tensor
    +-- ShardsError             a shards folder that is not what its manifest says
    +-- MismatchError           plan, shards, model and world size do not belong together
    +-- DataError               training data that cannot be read, or is too little to train on
    +-- OptionError             an argument or option that makes no sense, whatever the files hold
    +-- OutputError             a file or folder that cannot be written
    +-- FailedRankError         another rank of the job failed or ended in a call that all ranks make
    +-- NonFiniteError          training has come to NaN or inf
    +-- MissingDependencyError  the operation needs a package that is not installed

An error carries `Fault`s, because people fix ten mistakes faster when they see all ten. It does not print, exit or
know about the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is wrong: what, where, got, expected, next step.

    `where` is a dotted path into a document (`layer_specs[2].shape`), a parameter's name or a file. `code` is the kind
    of fault in short (`undecided-weight`), for programs: it stays when a message is reworded, and is not printed.
    """

    what: str
    where: str
    got: str = ""
    expected: str = ""
    next: str = ""
    code: str = ""

    def __str__(self) -> str:
        lines = [self.what, f"  where:    {self.where}"]
        if self.got:
            lines.append(f"  got:      {self.got}")
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.next:
            lines.append(f"  next:     {self.next}")
        return visible("\n".join(lines))


def visible(text: str) -> str:
    """`text` with what acts on a terminal written out, `\\x1b` for ESC: names in files must not.

    Control characters but newline and tab, what turns the direction of text, and half characters, which no terminal
    can be sent.
    """
    return _ACTING.sub(lambda found: f"\\x{ord(found[0]):02x}" if found[0] < "\u0100" else _escaped(found), text)


def visible_json(text: str) -> str:
    """A JSON text with the same written as JSON writes it: its value stays."""
    return _ACTING.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class AutoTPError(Exception):
    """One or more faults in what the user gave us, sorted and reported together."""

    def __init__(self, faults: Fault | Iterable[Fault]) -> None:
        many = [faults] if isinstance(faults, Fault) else list(faults)
        self.faults: tuple[Fault, ...] = tuple(sorted(set(many), key=lambda f: (f.where, f.what, f.got)))
        assert self.faults, "an AutoTPError needs at least one fault"
        super().__init__("\n".join(str(fault) for fault in self.faults))

    def __reduce__(self) -> tuple[type[AutoTPError], tuple[tuple[Fault, ...]]]:
        return type(self), (self.faults,)


class DocumentError(AutoTPError):
    """A plan, spec or manifest that is not what its schema says."""


class CompileError(AutoTPError):
    """Specs, model and tp_size do not make a plan."""


class CheckpointError(AutoTPError):
    """A checkpoint folder or safetensors file that cannot be read, or lacks a tensor."""


class ShardsError(AutoTPError):
    """A shards folder that is not what its manifest says."""


class MismatchError(AutoTPError):
    """Plan, shards, model and world size do not belong together."""


class DataError(AutoTPError):
    """Training data that cannot be read, or is too little to train on."""


class OptionError(AutoTPError):
    """An argument or option that makes no sense, whatever the files hold."""


class OutputError(AutoTPError):
    """A file or folder that cannot be written."""


class FailedRankError(AutoTPError):
    """A rank failed or ended in a call that all ranks make."""


class NonFiniteError(AutoTPError):
    """Training has come to NaN or inf."""


class MissingDependencyError(AutoTPError):
    """The operation needs a package that is not installed."""
