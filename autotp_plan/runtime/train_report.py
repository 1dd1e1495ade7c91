"""What `runtime.train` shows of a job: lines on rank 0's terminal, and a metrics file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import torch

from autotp_plan.runtime.checkpoint.outputs import check_writable
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import Fault, OutputError


class Report:
    """Shows what happens, on one rank alone.

    Args:
        metrics: a file for one JSON line per step, or None.
        is_first: whether this is the rank that shows it.
    """

    def __init__(self, metrics: Path | None, is_first: bool) -> None:
        self.is_first = is_first
        self.metrics = metrics if is_first else None

    def begin(self, last_step: int) -> None:
        """Keep the metrics of the steps that a resumed job has done, and no others."""
        if self.metrics:
            lines = self.metrics.read_text(encoding="utf-8").splitlines(True) if self.metrics.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
            documents.write_atomically(self.metrics, "".join(kept))

    def say(self, text: str) -> None:
        """Show a line."""
        if self.is_first:
            click.echo(text)

    def step(self, step: int, num_steps: int, loss: float, speed: float, device: torch.device) -> None:
        """Show a step: its loss, its speed in tokens per second, and the memory of this rank."""
        memory = _memory(device)
        self.say(f"step {step:>{len(str(num_steps))}}/{num_steps}  loss {loss:.4f}  {speed:,.0f} tokens/s  {memory}")
        if self.metrics:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "loss": loss, "tokens_per_second": speed}) + "\n")


def check_metrics(path: Path) -> None:
    """Check that a metrics file can be written, and that what is there is one of an earlier run.

    Raises:
        OutputError: it holds anything else, is no plain file, or its folder cannot be written to.
    """
    if path.exists():
        if not path.is_file():
            raise OutputError(_no_metrics(str(path), "a folder, device or pipe"))
        try:
            with open(path, "r+", encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.endswith("\n") and not _is_step(line):
                        raise OutputError(_no_metrics(f"{path}: line {number}", repr(line[:40])))
        except UnicodeDecodeError:
            raise OutputError(_no_metrics(str(path), "bytes that are not UTF-8 text")) from None
        except OSError as error:
            raise OutputError(_no_metrics(str(path), error.strerror or str(error))) from None
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise OutputError(_no_metrics(str(path), f"no folder {folder}"))
    check_writable(folder)


def _is_step(line: str) -> bool:
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) and isinstance(found.get("step"), int)


def _no_metrics(where: str, got: str) -> Fault:
    return Fault(
        code="metrics-file",
        what="the metrics cannot be written to this file",
        where=where,
        got=got,
        expected='a new file in a folder that can be written to, or one of an earlier run, of lines {"step": ...}',
        next="give another file to --metrics, or move this one somewhere else",
    )


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB at most on the device"
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return f"{kib / 1024:,.0f} MiB"
