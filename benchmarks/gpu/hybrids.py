"""python -m benchmarks.gpu.hybrids FOLDER FAMILY

Infers the rules of a small model whose mixers are not attention, on the CPU, for the checks on a GPU: writes
`FOLDER/FAMILY.spec.json`. They start beside the other checks, because an inference takes half a minute.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HYBRIDS = ("bamba", "mamba2", "nemotron_h", "falcon_h1", "qwen3_next", "qwen3_5_text", "lfm2", "minicpm3")


def start(folder: Path, environment: dict[str, str], families: Sequence[str] = HYBRIDS) -> list[subprocess.Popen[str]]:
    """Start a process for each family, none of which touches the card."""
    on_cpu = {**environment, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    processes = []
    for family in families:
        command = [sys.executable, "-m", "benchmarks.gpu.hybrids", str(folder), family]
        with (folder / f"{family}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=on_cpu, stdout=log, stderr=log, text=True))
    return processes


def main() -> None:
    from autotp_plan.inference.infer import infer_spec
    from tests.helpers.mixers import mixer_folder

    folder, family = Path(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as name:
        spec = infer_spec(mixer_folder(Path(name), family))
    unfinished = folder / f"{family}.unfinished.json"
    unfinished.write_text(json.dumps(spec))
    unfinished.rename(folder / f"{family}.spec.json")


if __name__ == "__main__":
    main()
