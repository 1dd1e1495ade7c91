"""python -m benchmarks.remote_plans

How long `autotp-plan compile` takes for large published models on the hub, and how many bytes it fetches: names, shapes
and dtypes are the published ones, the tensors are holes, the hub is a process of ours on loopback. Start-up is
included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.dequantize.test_published import MODELS
from tests.helpers.paths import PLANS
from tests.helpers.sparse import llama_tensors, write_sparse_checkpoint

SERVE = """
import sys
from pathlib import Path
from tests.helpers.hub_server import Repository, folder_files, hub_server
with hub_server() as server:
    repository = server.repositories["org/model"] = Repository(folder_files(Path(sys.argv[1])))
    repository.sha256 = dict.fromkeys(repository.files, "0" * 64)
    print(server.url, flush=True)
    sys.stdin.readline()
    print(sum(request.sent for request in server.requests), len(server.requests), flush=True)
"""


def compile_from_hub(folder: Path, tp_size: int, work: Path) -> tuple[float, int, int]:
    """Seconds, bytes and requests."""
    command = [sys.executable, "-c", SERVE, str(folder)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "0"}
    plan = [str(Path(sys.executable).with_name("autotp-plan")), "compile", "--model", "org/model", "--tp", str(tp_size)]
    started = time.perf_counter()
    subprocess.run([*plan, "-o", str(work / "plan.json")], check=True, env=environment, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    sent, _ = server.communicate("\n")
    size, requests = map(int, sent.split())
    return seconds, size, requests


def main() -> None:
    import json

    config = json.loads((PLANS / "llama_3_1_70b" / "config.json").read_text())
    models = {"llama_3_1_70b": (lambda: (config, llama_tensors(config), 30), 8)}
    models.update({name: (made[0], made[1]) for name, made in MODELS.items()})
    print(f"load of the machine {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    for name, (make, tp_size) in models.items():
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work, "model")
            folder.mkdir()
            size = write_sparse_checkpoint(folder, *make())
            seconds, sent, requests = compile_from_hub(folder, tp_size, Path(work))
        print(f"{name:16} {size / 1e9:6.0f} GB  {seconds:5.2f} s  {sent / 1e6:6.2f} MB in {requests} requests")


if __name__ == "__main__":
    main()
