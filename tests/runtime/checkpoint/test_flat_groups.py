"""A job is not resumed on a different mesh when DeepSpeed holds its weights elsewhere than they are looked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.errors import AutoTPError, CheckpointError, MismatchError, MissingDependencyError
from tests.helpers.launch import launch
from tests.helpers.paths import ROOT

STAGES = (1, 2, 3)
SAVED_UNDER = {1: 2, 2: 1, 3: 1}
"""The ZeRO stage that a job was saved under, by the stage it is resumed under."""


def start(work: Path, stage: int) -> tuple[Any, Any]:
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers.parity import engine_settings

    plan = load_plan(work / "plan.json")
    torch.manual_seed(5)
    engine, *_ = plan.initialize(plan.load_model(work / "model").train(), config=engine_settings(stage))
    return plan, engine


def renamed(engine: Any, stage: int) -> None:
    """What a new version of DeepSpeed that renames an attribute would do."""
    if stage == 3:
        engine.optimizer.gradient_positions = engine.optimizer.__dict__.pop("grad_position")
        return
    for parameter in engine.module.parameters():
        parameter._mapping = parameter._hp_mapping
        del parameter._hp_mapping


def one_is_lost(engine: Any, stage: int) -> None:
    parameter = next(one for one in engine.module.parameters() if stage == 3 or one._hp_mapping is not None)
    if stage == 3:
        del engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
    else:
        parameter._hp_mapping = None


def all_are_lost(engine: Any, stage: int) -> None:
    for parameter in engine.module.parameters():
        if stage == 3:
            parameter.ds_numel = 0
        else:
            parameter._hp_mapping = None


def one_lies_elsewhere(engine: Any, stage: int) -> None:
    """As if positions were counted in another way."""
    parameter = next(one for one in engine.module.parameters() if stage == 3 or one._hp_mapping is not None)
    if stage == 3:
        engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)][1] += 1
    else:
        parameter._hp_mapping.hp_fragment_address.start += 1


def starts_elsewhere(engine: Any, stage: int) -> None:
    """As if the elements of a parameter were counted from another one."""
    if stage == 3:
        optimizer, rank = engine.optimizer, engine.optimizer._get_param_partition_rank
        optimizer._get_param_partition_rank = lambda parameter: 1 - rank(parameter)
        optimizer.grad_position = {
            key: [group, at, size + 1] for key, (group, at, size) in optimizer.grad_position.items()
        }
    else:
        parameter = next(one for one in engine.module.parameters() if one._hp_mapping is not None)
        parameter._hp_mapping.lp_fragment_address.start += 1


PLANTED: list[Callable[[Any, int], None]] = [renamed, one_is_lost, all_are_lost, one_lies_elsewhere, starts_elsewhere]


def refused(work: Path) -> dict[str, str]:
    """Inside a rank: what is said of each planted change at each stage, and whether the weights stayed as they were."""
    import torch

    found = {}
    for stage in STAGES:
        for plant in (None, *PLANTED):
            plan, engine = start(work, stage)
            before = weights(engine, stage)
            if plant is not None:
                plant(engine, stage)
            try:
                plan.load_checkpoint(engine, work / f"zero{SAVED_UNDER[stage]}")
                said = "loaded"
            except AutoTPError as error:
                said = f"{type(error).__name__}: {error}"
            changed = any(not torch.equal(*pair) for pair in zip(before, weights(engine, stage)))
            found[f"{plant.__name__ if plant else 'nothing'} at stage {stage}"] = f"{changed}: {said}"
    return found


def weights(engine: Any, stage: int) -> list[Any]:
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    return [flat.detach().clone() for flat in getattr(engine.optimizer, name)]


def save(work: Path) -> None:
    from tests.helpers.models import batch

    for stage in (1, 2):
        plan, engine = start(work, stage)
        for step in range(2):
            engine.backward(engine(input_ids=batch(step), labels=batch(step), use_cache=False).loss)
            engine.step()
        plan.save_checkpoint(engine, work / f"zero{stage}")
        engine.destroy()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("flat groups")
    folder = save_checkpoint(work / "model", "llama", num_hidden_layers=1)
    (work / "plan.json").write_text(compile_plan(folder, tp_size=1).to_json())
    launch(save, 2, work, timeout=120)
    return work


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_name_that_moved_is_refused_and_nothing_is_loaded(work: Path) -> None:
    for found in launch(refused, 2, work, timeout=300):
        for name, said in found.items():
            if name.startswith("nothing"):
                assert said == "True: loaded", name
            elif name.startswith("renamed"):
                assert said.startswith("False: MissingDependencyError: deepspeed "), f"{name}: {said}"
                assert "is not as autotp-plan needs it" in said and "for resuming on a different mesh" in said, name
            elif "one_is_lost at stage 3" in name:
                assert said.startswith("False: MissingDependencyError: deepspeed "), f"{name}: {said}"
            else:
                assert said.startswith("False: MismatchError: "), f"{name}: {said}"
                assert "does not hold its weights where they were looked for" in said, f"{name}: {said}"


def test_what_tiles_a_parameter() -> None:
    from autotp_plan.runtime.checkpoint.flat_groups import tiling_faults
    from autotp_plan.runtime.deepspeed.zero_internals import FlatRange

    def ranges(*pairs: tuple[int, int]) -> list[FlatRange]:
        return [FlatRange(group=0, start=start, at=0, numel=numel) for start, numel in pairs]

    assert not tiling_faults(ranges((0, 3), (3, 4)), 7)
    assert not tiling_faults(ranges((3, 4), (0, 3), (7, 0)), 7), "in any order; empty ranges hold nothing"
    assert not tiling_faults([], 0)
    assert tiling_faults(ranges((0, 3), (4, 3)), 7) == ["elements 3 to 4 are held by no DP rank"]
    assert tiling_faults(ranges((0, 4), (3, 4)), 7) == ["elements 3 to 4 are held twice"]
    assert tiling_faults(ranges((0, 3)), 7) == ["3 of 7 elements are held"]
    assert tiling_faults([], 7) == ["0 of 7 elements are held"]


def saved_job(folder: Path) -> Any:
    from autotp_plan.runtime.checkpoint.zero_files import SavedJob
    from autotp_plan.schemas.plan.document import Plan

    about = json.loads((folder / "autotp_checkpoint.json").read_text())
    return SavedJob(folder, Plan.read(folder / "autotp_plan.json"), about["dp_size"], about["zero_stage"])


def without_one(mapping: dict[str, Any]) -> None:
    mapping.pop(next(iter(mapping)))


def without_any(mapping: dict[str, Any]) -> None:
    mapping.clear()


def shifted(mapping: dict[str, Any]) -> None:
    mapping[next(iter(mapping))].start += 1


def shorter(mapping: dict[str, Any]) -> None:
    mapping[next(iter(mapping))].numel -= 1


@pytest.mark.parametrize("plant", [None, without_one, shifted, shorter, without_any])
def test_a_saved_job_with_weights_elsewhere_is_refused(tmp_path: Path, plant: Callable[[Any], None] | None) -> None:
    import torch

    folder = tmp_path / "step2"
    shutil.copytree(ROOT / "tests" / "golden" / "version_0_1" / "job" / "step2", folder)
    file = folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    content = torch.load(file, weights_only=False)
    if plant is None:
        saved_job(folder).check()
        return
    plant(content["optimizer_state_dict"]["param_slice_mappings"][0])
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="do not hold the weights where they were looked for"):
        saved_job(folder).check()


def test_a_saved_job_with_other_keys_is_refused(tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "step2"
    shutil.copytree(ROOT / "tests" / "golden" / "version_0_1" / "job" / "step2", folder)
    file = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(file, weights_only=False)
    content["optimizer_state_dict"]["slices"] = content["optimizer_state_dict"].pop("param_slice_mappings")
    torch.save(content, file)
    with pytest.raises(MissingDependencyError, match="param_slice_mappings"):
        saved_job(folder).check()


def test_parameters_that_were_added_are_refused() -> None:
    from autotp_plan.runtime.checkpoint.mesh_change import _planned_sizes
    from autotp_plan.schemas.plan.document import Plan

    plan = Plan.read(ROOT / "tests" / "golden" / "version_0_1" / "tp2.json")
    assert _planned_sizes(["model.norm.weight"], plan, 0) == {"model.norm.weight": plan.model.config["hidden_size"]}  # type: ignore[index]
    with pytest.raises(MismatchError, match="a trained parameter is not the plan's"):
        _planned_sizes(["model.norm.weight", "adapter.weight"], plan, 0)
