"""A rank that fails in `load_model` or `initialize`, whatever it fails by, and ranks that are given other things.

Every rank gets the same error, which names the rank and its reason, and no rank waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch
from tests.helpers.told import check_told

SECONDS = 60
"""On a machine that does much else; alone it is one or two."""


def refusal(call: Callable[[], Any]) -> str:
    """The class and the faults of the error that `call` ends in, and that it ended in time."""
    from autotp_plan.schemas.errors import AutoTPError

    began = time.monotonic()
    try:
        call()
    except AutoTPError as error:
        assert time.monotonic() - began < SECONDS
        return f"{type(error).__name__}: " + "; ".join(f"{one.what} | {one.where} | {one.got}" for one in error.faults)
    except Exception as error:
        return f"raw {type(error).__name__}"
    return "no error"


def planted_on(rank: int, module: Any, name: str, value: Any, call: Callable[[], Any]) -> str:
    """The refusal of a call while a name of a module is another on one rank."""
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(module, name, value)
        return refusal(call)


def _fails(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def in_two_ranks(work: Path) -> dict[str, str]:
    import torch
    import torch.distributed as dist

    from autotp_plan.runtime import load_model, load_plan, make_engine
    from autotp_plan.runtime.loading import shard_model
    from autotp_plan.runtime.parameters import compared
    from tests.helpers.parity import engine_settings

    me = dist.get_rank()
    plan, found = load_plan(work / "plan.json"), {}
    shards = work / "shards"

    def planted(module: Any, name: str, value: Any, call: Callable[[], Any], on: int = 1) -> str:
        return planted_on(on, module, name, value, call)

    def load() -> Any:
        return plan.load_model(shards)

    # load_model
    found["plans of other TP sizes"] = refusal(lambda: load_plan(work / ("plan.json", "plan1.json")[me]).init_mesh())
    found["no folder"] = refusal(lambda: plan.load_model((shards, work / "nowhere")[me]))
    found["memory, before"] = planted(load_model, "open_weights", _fails(MemoryError("32 GiB")), load)
    found["memory, reading"] = planted(load_model, "read_weights", _fails(MemoryError("1 GiB")), load)
    found["a mistake on rank 0"] = planted(shard_model, "restore_ties", _fails(KeyError("tie")), load, on=0)
    found["a function of one's own fails on all"] = refusal(lambda: plan.load_model(shards, model=_fails(ValueError())))
    found["dtype"] = refusal(lambda: plan.load_model(shards, dtype=(torch.float32, torch.bfloat16)[me]))
    found["options"] = refusal(lambda: plan.load_model(shards, check_batches_every=(100, 50)[me]))
    found["interval"] = refusal(lambda: plan.load_model(shards, check_batches_every=(100, 0)[me]))
    found["attention"] = refusal(lambda: plan.load_model(shards, attn_implementation=("sdpa", "eager")[me]))
    found["config"] = refusal(lambda: plan.load_model(work / ("model", "other-config")[me]))
    old = compared.versions() | {"torch": "2.4.0"}
    found["versions"] = planted(load_model, "versions", lambda: old, load)
    found["versions that may differ"] = planted(load_model, "lenient_versions", lambda: {"python": "3.9"}, load)

    # initialize
    model = load()
    config = engine_settings(1)

    def initialize(given: Any = config, **more: Any) -> Any:
        return plan.initialize(model, config=given, **more)

    found["config file is missing"] = refusal(lambda: initialize(config if me == 0 else work / "nowhere.json"))
    other = {**config, "gradient_clipping": 0.25, "optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}
    found["DeepSpeed configs"] = refusal(lambda: initialize((config, other)[me]))
    found["what a rank logs"] = refusal(lambda: initialize((config, {**config, "steps_per_print": 7})[me]))
    model = load()
    if me:
        next(model.parameters()).requires_grad_(False)
    found["frozen"] = refusal(initialize)
    model = load()
    adam = [torch.optim.AdamW(model.parameters(), lr=rate) for rate in (1e-3, 2e-3)]
    without = {key: value for key, value in config.items() if key != "optimizer"}
    found["optimizers"] = refusal(lambda: initialize(without, optimizer=adam[me]))
    found["a mistake"] = planted(make_engine, "check_optimizer", _fails(RuntimeError("no compiler")), initialize)
    found["at last"] = refusal(initialize)
    return found


EXPECTED = {
    "plans of other TP sizes": ("MismatchError: the ranks would make other process groups", "rank 0: 2; rank 1: 1"),
    "no folder": ("CheckpointError: there is no safetensors checkpoint here", "(rank 1)"),
    "memory, before": ("FailedRankError: the weights could not be read", "(rank 1) | MemoryError: 32 GiB"),
    "memory, reading": ("FailedRankError: the weights could not be read", "(rank 1) | MemoryError: 1 GiB"),
    "a mistake on rank 0": ("FailedRankError: the weights could not be read", "(rank 0) | KeyError: 'tie'"),
    "a function of one's own fails on all": ("raw ValueError",),
    "dtype": ("MismatchError: the ranks would load parts of different models", "dtypes: ", "rank 1: torch.bfloat16"),
    "options": ("MismatchError", "options: 2 | rank 0: 100; rank 1: 50"),
    "interval": ("OptionError: batches cannot be compared so often", "(rank 1)"),
    "attention": ("MismatchError", "config: attention | rank 0: sdpa; rank 1: eager"),
    "config": ("MismatchError: config.json is not the one the plan was compiled from", "(rank 1)"),
    "versions": ("MismatchError", "versions: torch | ", "rank 1: 2.4.0"),
    "versions that may differ": ("no error",),
    "config file is missing": ("DocumentError", "(rank 1)"),
    "DeepSpeed configs": (
        "MismatchError: the ranks would make engines that differ",
        "gradient_clipping",
        "rank 1: 0.25",
    ),
    "what a rank logs": ("no error",),
    "frozen": ("MismatchError", "parameters: ", "rank 1: torch.float32, frozen"),
    "optimizers": ("MismatchError", "optimizer: groups.0.lr | rank 0: 0.001; rank 1: 0.002"),
    "a mistake": ("FailedRankError: the engine could not be made", "(rank 1) | RuntimeError: no compiler"),
    "at last": ("no error",),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json
    import shutil

    from autotp_plan.planner import compile_plan, presplit
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("ranks")
    folder = save_checkpoint(work / "model", "llama")
    plan = compile_plan(folder, tp_size=2)
    (work / "plan.json").write_text(plan.to_json())
    (work / "plan1.json").write_text(compile_plan(folder, tp_size=1).to_json())
    presplit(plan, folder, work / "shards")
    shutil.copytree(folder, work / "other-config")
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (work / "other-config" / "config.json").write_text(json.dumps(config))
    return work


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_all_ranks_get_one_error_that_names_the_rank(work: Path) -> None:
    check_told(launch(in_two_ranks, 2, work), EXPECTED)
