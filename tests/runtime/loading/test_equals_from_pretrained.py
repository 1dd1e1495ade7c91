"""A loaded model equals `from_pretrained`, bit for bit: values and dtypes of parameters and buffers, in each dtype."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.errors import MismatchError
from tests.helpers.launch import launch
from tests.helpers.models import PRESET_VARIANTS, load_dense, save_checkpoint

DTYPES = ("float32", "bfloat16", "float16", "float64")
AS_IN_CONFIG = ("float32", "bfloat16", "float16")
MIXED = ("kept", "mixed", "mixed.shards")
PLANTED = "planted"


def write_dtype(folder: Path, dtype: str | None) -> None:
    """Let a checkpoint's config name another dtype than that of its tensors."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype} if dtype else config))


def with_dtype(folder: Path, dtype: str | None) -> Path:
    """A copy of a checkpoint whose config names `dtype`, or none."""
    copy = folder.with_name(f"{folder.name}.{dtype}")
    shutil.copytree(folder, copy)
    write_dtype(copy, dtype)
    return copy


def mix(folder: Path) -> None:
    """Store the weights of a checkpoint in bfloat16 and its norms in float32, as some checkpoints are published."""
    import torch
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        mixed = {name: value if "norm" in name else value.to(torch.bfloat16) for name, value in tensors.items()}
        save_file(mixed, file, {"format": "pt"})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 checkpoints and plans of all variants, and two in bfloat16: with a float32 bias, with float32 norms."""
    import torch

    from autotp_plan.planner import compile_plan, presplit

    work = tmp_path_factory.mktemp("equal")
    for variant in PRESET_VARIANTS:
        plan = compile_plan(save_checkpoint(work / variant, variant), tp_size=2)
        (work / f"{variant}.json").write_text(plan.to_json())
        for dtype in AS_IN_CONFIG:
            with_dtype(work / variant, dtype)
    dense: Any = load_dense(work / "deepseek_v3", torch.bfloat16)
    dense.save_pretrained(work / "kept")  # with a bias in float32
    (work / "kept.json").write_text(compile_plan(work / "kept", tp_size=2).to_json())
    shutil.copytree(work / "llama", work / "mixed")
    mix(work / "mixed")
    write_dtype(work / "mixed", "bfloat16")
    plan = compile_plan(work / "mixed", tp_size=2)
    (work / "mixed.json").write_text(plan.to_json())
    presplit(plan, work / "mixed", work / "mixed.shards")
    return work


def differences(model: Any, dense: Any, plan: Any) -> list[str]:
    """What differs between a sharded model and the dense one: a parameter or buffer, its dtype or its values."""
    import torch

    from autotp_plan.runtime import local_shard
    from autotp_plan.runtime.tensor_parallel.collectives import take

    expected = {**dict(dense.named_parameters(remove_duplicate=False)), **dict(dense.named_buffers())}
    planned = {parameter.name: plan.document.layouts[parameter.layout] for parameter in plan.document.expanded()}
    tied = {tie.name: tie.to for tie in plan.document.tied}
    found = []
    buffers = {name for name, _ in model.named_buffers()}
    if buffers != {name for name, _ in dense.named_buffers()}:
        found.append("names of buffers")
    for name, full in expected.items():
        if name in tied:
            if model.get_parameter(name) is not model.get_parameter(tied[name]):
                found.append(f"{name}: not tied")
            continue
        layout = planned.get(name)
        mine: Any = model.get_buffer(name) if layout is None else local_shard(model, name)
        wanted = full
        if layout is not None and layout.dim is not None:
            wanted = take(full.reshape(layout.shape), layout.rank_intervals(plan.ranks.tp_rank), layout.dim)
        if mine.dtype != wanted.dtype:
            found.append(f"{name}: {mine.dtype} for {wanted.dtype}")
        elif not torch.equal(mine, wanted.reshape(mine.shape)):
            found.append(f"{name}: other values")
    return found


def all_differences(work: Path) -> dict[str, list[str]]:
    """Inside a rank: the differences of every variant, and of errors that are planted."""
    import torch
    from transformers.utils import logging

    from autotp_plan.runtime import load_plan

    logging.disable_progress_bar()
    found = {}
    for variant in PRESET_VARIANTS:
        plan = load_plan(work / f"{variant}.json")
        for name in DTYPES:
            dtype = getattr(torch, name)
            model, dense = plan.load_model(work / variant, dtype=dtype), load_dense(work / variant, dtype)
            found[f"{variant} {name}"] = differences(model, dense, plan)
            assert model.config.dtype == dense.config.dtype
        for name in AS_IN_CONFIG:
            folder = work / f"{variant}.{name}"
            found[f"{variant} auto {name}"] = differences(plan.load_model(folder), load_dense(folder, "auto"), plan)
    plan = load_plan(work / "kept.json")
    model = plan.load_model(work / "kept")
    found["kept"] = differences(model, load_dense(work / "kept", "auto"), plan)
    plan.save_shards(model, work / "kept.saved")
    plan = load_plan(work / "mixed.json")
    dense = load_dense(work / "mixed", "auto")
    for kind in ("mixed", "mixed.shards"):
        model = plan.load_model(work / kind)
        found[kind] = differences(model, dense, plan)
        tokens = torch.arange(3, 19)[None]
        assert torch.allclose(model(input_ids=tokens).logits, dense(input_ids=tokens).logits, atol=0.1)
    found.update(planted(work))
    return found


def planted(work: Path) -> dict[str, list[str]]:
    """Inside a rank: the differences that errors make which were found once."""
    import torch

    from autotp_plan.runtime import load_plan

    def of(variant: str, change: Callable[[Any], None]) -> list[str]:
        plan = load_plan(work / f"{variant}.json")
        model = plan.load_model(work / variant, dtype=torch.bfloat16)
        change(model)
        return differences(model, load_dense(work / variant, torch.bfloat16), plan)

    def all_bfloat16(model: Any) -> None:
        model.bfloat16()

    def in_bfloat16_throughout(model: Any) -> None:
        from transformers.models.codegen.modeling_codegen import create_sinusoidal_positions

        for layer in model.transformer.h:
            torch.set_default_dtype(torch.bfloat16)
            layer.attn.embed_positions = create_sinusoidal_positions(64, 4).to(layer.attn.embed_positions.dtype)
            torch.set_default_dtype(torch.float32)

    def one_bit(model: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight[3] *= 1.01

    return {
        f"{PLANTED} dtype": of("deepseek_v3", all_bfloat16),
        f"{PLANTED} buffer": of("codegen", in_bfloat16_throughout),
        f"{PLANTED} value": of("llama", one_bit),
    }


@pytest.fixture(scope="module")
def found(work: Path) -> dict[str, list[str]]:
    """What differs on any rank."""
    ranks = launch(all_differences, 2, work)
    return {key: sorted({*ranks[0][key], *ranks[1][key]}) for key in ranks[0]}


@pytest.mark.distributed
@pytest.mark.timeout(270)
@pytest.mark.parametrize("variant", [*PRESET_VARIANTS, *MIXED])
def test_a_loaded_model_is_the_model_of_from_pretrained(found: dict[str, list[str]], variant: str) -> None:
    compared = {key: value for key, value in found.items() if key.split()[0] == variant}
    assert len(compared) == (1 if variant in MIXED else len(DTYPES) + len(AS_IN_CONFIG))
    assert {key: value for key, value in compared.items() if value} == {}


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_planted_differences_are_found(found: dict[str, list[str]]) -> None:
    assert "model.layers.1.mlp.gate.e_score_correction_bias: torch.bfloat16 for torch.float32" in found["planted dtype"]
    assert found["planted buffer"] == [
        f"transformer.h.{layer}.attn.embed_positions: other values" for layer in range(2)
    ]
    assert found["planted value"] == ["model.norm.weight: other values"]


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_what_is_kept_in_float32_is_saved_in_float32(work: Path, found: dict[str, list[str]], tmp_path: Path) -> None:
    from autotp_plan.planner import merge

    merge(work / "kept.saved", tmp_path / "merged")
    merged = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert merged == (work / "kept" / "model.safetensors").read_bytes()


def test_weights_of_several_dtypes_need_one_that_is_named(work: Path) -> None:
    """As its next step says, a `dtype` is enough."""
    import torch

    from autotp_plan.runtime.loading.empty_model import empty_model
    from autotp_plan.schemas.plan.document import Plan

    folder, plan = with_dtype(work / "mixed", None), Plan.read(work / "mixed.json")
    with pytest.raises(MismatchError, match=r"several dtypes.*\n.*\n.*BF16, F32\n.*\n.*dtype=torch\.bfloat16"):
        empty_model(folder, plan, None, None, {})
    _, dtypes = empty_model(folder, plan, None, torch.bfloat16, {})
    assert set(dtypes.values()) == {torch.bfloat16}


def test_a_model_of_the_users_keeps_the_dtypes_of_its_files(work: Path) -> None:
    """Given as a module, a transformers model too; with a `dtype` it keeps what stays float32 in float32."""
    import torch
    from torch import nn

    from autotp_plan.huggingface.meta_model import build_model
    from autotp_plan.runtime.loading.empty_model import empty_model
    from autotp_plan.schemas.plan.document import Plan

    plan = Plan.read(work / "deepseek_v3.json")
    model = build_model(work / "deepseek_v3")
    assert empty_model(work / "deepseek_v3", plan, model, None, {}) == (model, {})
    _, dtypes = empty_model(work / "deepseek_v3", plan, model, torch.bfloat16, {})
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    _, dtypes = empty_model(work / "llama", plan, lambda: nn.Linear(2, 2), torch.bfloat16, {})
    assert dtypes == {"weight": torch.bfloat16, "bias": torch.bfloat16}
