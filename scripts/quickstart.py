"""Runs the commands of `docs/quickstart.md` and puts what they print into the page: `python -m scripts.quickstart`.

A block of output in the page follows a line `<!-- output of: COMMAND -->`. The commands run in the page's order, in a
new folder with a copy of `examples/` and of the README, in the environment of the interpreter that runs this. It
takes about three minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "quickstart.md"
BLOCK = re.compile(r"(<!-- output of: (.*?) -->\n```text\n)(.*?)(```)", re.DOTALL)
NOISE = re.compile(r"^\[\d{4}-\d\d-\d\d .*\n|.*\r", re.MULTILINE)  # DeepSpeed's log, progress bars


def run(command: str, folder: Path) -> str:
    """What a command prints on standard output, without blanks at the ends of lines."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, text=True, check=False, capture_output=True, timeout=900
    )
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout}{done.stderr}")
    lines = NOISE.sub("", done.stdout).splitlines()
    return "".join(line.rstrip() + "\n" for line in lines)


def main() -> None:
    """Run every command of the page, and write the page."""
    with tempfile.TemporaryDirectory(prefix="quickstart-") as name:
        folder = Path(name)
        shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "README.md", folder)
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(
            BLOCK.sub(lambda found: f"{found[1]}{run(' '.join(found[2].split()), folder)}{found[4]}", text),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
