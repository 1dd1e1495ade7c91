"""Try an installed autotp-plan where there is no torch: `python .ci/try_wheel.py`, with the Python it is installed in.

Plans, checks, pre-splits and merges a small checkpoint by the command line; looks at what `import autotp_plan` gives.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "deepspeed", "accelerate", "safetensors", "numpy")


def command(*arguments: object, status: int = 0) -> str:
    """What `autotp-plan ARGUMENTS` prints; it must exit with `status`, and never with a traceback."""
    program = Path(sys.executable).parent / "autotp-plan"
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    assert "Traceback" not in said, said
    return said


def checkpoint_writer() -> Any:
    """`tests/helpers/checkpoints.py`, loaded from its file: the repository itself must not be importable here."""
    spec = importlib.util.spec_from_file_location("checkpoints", ROOT / "tests" / "helpers" / "checkpoints.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def try_python() -> None:
    """What `import autotp_plan` gives, and what it says where the runtime's packages are missing."""
    import autotp_plan
    from autotp_plan.schemas.errors import MissingDependencyError

    home = Path(autotp_plan.__file__).parent
    assert ROOT not in home.parents or home.parent.name == "site-packages", f"{home} is not what was installed"
    assert autotp_plan.__version__ == metadata.version("autotp-plan")
    assert callable(autotp_plan.compile_plan)
    try:
        autotp_plan.load_plan("plan.json")
    except MissingDependencyError as error:
        assert "pip install 'autotp-plan[train]'" in str(error), error
    else:
        raise AssertionError("a plan was loaded without torch")


def try_commands(work: Path) -> None:
    """From a checkpoint to shards and back, to the last byte."""
    checkpoint = checkpoint_writer().write_llama(work / "checkpoint")
    plan, shards, merged = work / "plan.json", work / "shards", work / "merged"
    version = metadata.version("autotp-plan")
    assert version in command("--version")
    assert "llama" in command("presets", "list")
    command("compile", "--model", checkpoint, "--tp", "2", "-o", plan)
    assert "the plan is sound" in command("check", plan, "--checkpoint", checkpoint)
    assert "model.layers.{0..1}" in command("show", plan)
    command("presplit", plan, "--checkpoint", checkpoint, "-o", shards)
    command("check", shards)
    command("merge", shards, "-o", merged)
    name = "model.safetensors"
    assert (merged / name).read_bytes() == (checkpoint / name).read_bytes()
    bare = work / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "config.json", bare)
    for arguments in (("compile", "--model", bare, "--tp", "2", "-o", work / "x"), ("verify", plan)):
        said = command(*arguments, status=2)
        assert "pip install 'autotp-plan[train]'" in said, said


if __name__ == "__main__":
    found = [name for name in HEAVY if importlib.util.find_spec(name) is not None]
    assert not found, f"this environment is to be without {', '.join(found)}"
    with tempfile.TemporaryDirectory() as folder:
        try_python()
        try_commands(Path(folder))
    print(f"autotp-plan {metadata.version('autotp-plan')} works on Python {sys.version.split()[0]} without torch")
