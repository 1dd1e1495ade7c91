"""Ray Train, by the command at the top of examples/ray_train.py: a local Ray of four workers, TP=2 x DP=2.

The command has a worker killed; the run without that is its undisturbed twin, and the dense model in one process the
measure of both. Ray runs in processes of its own, without dashboard or usage statistics, and leaves nothing behind.
"""

from __future__ import annotations

import importlib.util
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.examples.test_examples import TIMEOUT, command_of, run
from tests.helpers.paths import EXAMPLES

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(2 * TIMEOUT),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
]

COMMAND = [*command_of("ray_train.py"), "--storage_path", "runs"]
NUM_STEPS, SAVE_EVERY, KILL_AT = (
    int(COMMAND[COMMAND.index(f"--{name}") + 1]) for name in ("num_steps", "save_every", "kill_at")
)
CALM = [word for word in COMMAND if word not in ("--kill_at", str(KILL_AT))]


@pytest.fixture(scope="module")
def clone() -> Iterator[Path]:
    """A folder with the example, and a Ray that is this test's alone. Its path is short: Ray makes sockets under it."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        (folder / "examples").mkdir()
        for file in ("ray_train.py", "tiny.py"):
            shutil.copy(EXAMPLES / file, folder / "examples" / file)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TMPDIR", name)
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))  # else Ray writes one into the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_DEDUP_LOGS", "0")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        yield folder


@pytest.fixture(scope="module")
def calm(clone: Path) -> str:
    """What the undisturbed run said."""
    return run([*CALM, "--name", "calm"], clone)


def steps_of(output: str) -> list[tuple[int, float]]:
    """The steps that were trained, in the order they were trained in, each with its loss."""
    return [(int(step), float(loss)) for step, loss in re.findall(r"step (\d+)/\d+  loss (\d+\.\d+)", output)]


def dense_losses(folder: Path) -> list[float]:
    """The mean loss of both data-parallel ranks, in one process with the whole model."""
    import torch
    from torch.utils.data.distributed import DistributedSampler

    from autotp_plan.runtime.data.text import TokenDataset, synthetic_tokens
    from tests.helpers.models import load_dense

    dataset = TokenDataset(synthetic_tokens(260, 40 * 32, seed=0), 32)
    model = load_dense(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    samplers: list[Any] = [DistributedSampler(dataset, num_replicas=2, rank=rank) for rank in range(2)]
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        orders = [list(sampler) for sampler in samplers]
        for at in range(0, 20, 2):
            batches = [torch.stack([dataset[index]["input_ids"] for index in order[at : at + 2]]) for order in orders]
            loss = torch.stack([model(input_ids=batch, labels=batch).loss for batch in batches]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as DeepSpeed does
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses[:NUM_STEPS]


def test_losses_equal_the_dense_run(clone: Path, calm: str) -> None:
    steps, losses = zip(*steps_of(calm))
    assert steps == tuple(range(1, NUM_STEPS + 1))
    assert losses == pytest.approx(dense_losses(clone / "example-run" / "tiny-llama"), rel=1e-5)


def test_ray_registers_a_checkpoint_with_every_ranks_files(clone: Path, calm: str) -> None:
    run = clone / "runs" / "calm"
    parts = {f"mp_rank_0{tp}_model_states.pt" for tp in range(2)}
    parts |= {f"zero_pp_rank_{dp}_mp_rank_0{tp}_optim_states.pt" for dp in range(2) for tp in range(2)}
    parts |= {f"random-{rank}.safetensors" for rank in range(4)}
    about = {"autotp_checkpoint.json", "autotp_plan.json"}
    saved = [f"step{step}" for step in range(SAVE_EVERY, NUM_STEPS + 1, SAVE_EVERY)]
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == sorted(saved)
    for tag in saved:
        assert {path.name for path in (run / tag).iterdir()} == parts | about
    known = json.loads((run / "checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
    assert [entry["checkpoint_dir_name"] for entry in known] == saved, "what Ray knows of"
    assert f"Ray's last checkpoint: {run.resolve() / saved[-1]}, of {{'step': {NUM_STEPS}, " in calm


def test_a_killed_worker_resumes_from_the_last_checkpoint(clone: Path, calm: str) -> None:
    """Ray starts the workers again; from the last checkpoint on they have the losses of the undisturbed run."""
    output = run([*COMMAND, "--name", "killed"], clone)
    saved = (KILL_AT - 1) // SAVE_EVERY * SAVE_EVERY
    assert saved > 0 and f"going on after step {saved}" in output
    steps, losses = zip(*steps_of(output))
    again = tuple(range(saved + 1, NUM_STEPS + 1))
    # the first worker may be ended before it speaks of the step that all have trained
    assert steps in [(*range(1, end), *again) for end in (KILL_AT - 1, KILL_AT)]
    undisturbed = dict(steps_of(calm))
    assert losses == pytest.approx([undisturbed[step] for step in steps], rel=1e-6)


PLACED = """
import json, sys
from pathlib import Path
from types import SimpleNamespace

import ray_train
from autotp_plan.schemas.errors import MismatchError

found = []
for workers, kind, folder in json.loads(sys.argv[1]):
    storage = SimpleNamespace(experiment_fs_path=folder, storage_filesystem=SimpleNamespace(type_name=kind))
    context = SimpleNamespace(
        get_storage=lambda: storage, get_local_world_size=lambda: workers, get_node_rank=lambda: 1
    )
    try:
        found.append(str(ray_train.run_folder(context, 4)))
    except MismatchError as error:
        found.append([[fault.what, fault.where, fault.got, fault.expected, fault.next] for fault in error.faults])
print(json.dumps(found))
"""


def test_workers_that_split_a_tp_group_or_cannot_write_are_refused(clone: Path) -> None:
    """TP groups inside a node, and storage that every worker can write to: or a refusal that says what to do."""
    here, nowhere = str(clone), str(clone / "nowhere")
    cases = [[8, "local", here], [6, "local", here], [4, "s3", here], [4, "local", nowhere], [2, "s3", here]]
    command = [sys.executable, "-W", "ignore", "-c", PLACED, json.dumps(cases)]
    done = subprocess.run(command, cwd=clone / "examples", capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    spans = [
        "a TP group would span two nodes", "Ray's node 1", "6 workers", "a multiple of the plan's tp_size, 4",
        "use nodes with a multiple of tp_size free GPUs each, or a plan of a smaller tp_size",
    ]  # fmt: skip
    assert found[0] == here
    assert found[1] == [spans]
    assert [[fault[0] for fault in faults] for faults in found[2:4]] == [
        ["a worker cannot write into the folder of the run"]
    ] * 2
    assert len(found[4]) == 2, "both at once"
