"""The one place that prints and exits: what a command says, shows of long work, writes, and reports of errors.

What it prints may hold names from files of strangers: all of it is made visible first (`schemas.errors.visible`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from autotp_plan.schemas.documents import MOST_FAULTS, write_atomically
from autotp_plan.schemas.errors import AutoTPError, Fault, OutputError, visible, visible_json

if TYPE_CHECKING:
    from rich.console import Console

_F = TypeVar("_F", bound=Callable[..., None])
_LINE_SECONDS = 5.0
_ANY_WIDTH = 10_000
_MOST_HELD = 1024 * 1024
_STDOUT = frozenset({"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"})


def reported(function: _F) -> _F:
    """Turn known errors into a message on stderr and exit status 2."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except AutoTPError as error:
            _fail(error.faults)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as error:
            _fail([_refused(error)])

    return run  # type: ignore[return-value]


@contextlib.contextmanager
def progress(what: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A callback for (bytes done, bytes in all): a bar with rate and time left, or a plain line every few seconds.

    Args:
        what: the name of the work.
        quiet: show nothing; the callback is None.
    """
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield _lines(what)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (
            "{task.description}",
            BarColumn(),
            DownloadColumn(True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def table_width(stream: TextIO | None = None) -> int | None:
    """The width of a table on `stream` (default: standard output): a terminal's; in a pipe or a file nothing is cut."""
    return None if (stream or sys.stdout).isatty() else _ANY_WIDTH


def table_console() -> Console:
    """Where tables are printed: standard output, and what is between [ and ] is no markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, soft_wrap=not sys.stdout.isatty(), width=table_width())


def say(text: str, err: bool = False) -> None:
    """Print a line on standard output, or on standard error."""
    click.echo(visible(text), err=err)


def say_json(text: str) -> None:
    """Print JSON that is complete, with the newline at its end or without."""
    click.echo(visible_json(text), nl=not text.endswith("\n"))


def say_json_pieces(pieces: Iterable[str]) -> None:
    """Print JSON that is made piece by piece, with a newline at its end."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size > _MOST_HELD:
            click.echo(visible_json("".join(held)), nl=False)
            held, size = [], 0
    click.echo(visible_json("".join(held)))


def is_stdout(output: Path) -> bool:
    """Whether `-o` names standard output: `-`, or its device."""
    return str(output) in _STDOUT


def write_output(output: Path, text: str) -> None:
    """Write what a command was asked for with `-o`: a file, or standard output.

    Raises:
        OutputError: it cannot be written, or something is there that is no plain file.
    """
    if is_stdout(output):
        say_json(text)
        return
    try:
        write_atomically(output, text)
    except OSError as error:
        raise OutputError(_not_written(output, error)) from None


def _lines(what: str) -> Callable[[int, int], None]:
    from autotp_plan.planner.plan_table import human_bytes

    started = said = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < _LINE_SECONDS:
            return
        said = now
        rate = done / (now - started)
        left = f"{(total - done) / rate:.0f} s left" if rate else ""
        percent = 100 * done // max(total, 1)
        line = f"{what}: {human_bytes(done)} of {human_bytes(total)} ({percent}%), {human_bytes(int(rate))}/s, {left}"
        say(line, err=True)

    return show


def _fail(faults: Sequence[Fault]) -> None:
    for fault in faults[:MOST_FAULTS]:
        click.echo(click.style("error: ", fg="red", bold=True, reset=True) + str(fault), err=True)
    if len(faults) > 1:
        first = f", of which the first {MOST_FAULTS} are shown" if len(faults) > MOST_FAULTS else ""
        say(f"{len(faults)} errors{first}; nothing was written", err=True)
    sys.exit(2)


def _refused(error: OSError) -> Fault:
    return Fault(
        code="operating-system",
        what="the operating system refused",
        where=str(error.filename or "a file"),
        got=error.strerror or str(error),
        expected="paths that can be read and written",
        next="check the path and its permissions",
    )


def _not_written(path: Path, error: OSError) -> Fault:
    return Fault(
        code="file-not-written",
        what="the file cannot be written",
        where=str(path),
        got=error.strerror or str(error),
        expected="a file in a folder that exists and can be written to",
        next="make the folder, or give another path; `-o -` prints it",
    )
