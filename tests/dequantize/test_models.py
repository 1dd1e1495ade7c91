"""Models with fused experts, quantised as they are published: shards, merge, and training as the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autotp_plan.planner.compiler import compile_plan
from autotp_plan.planner.shards.merge import check_shards, merge
from autotp_plan.planner.shards.presplit import presplit
from autotp_plan.runtime.loading.read_weights import read_weight
from autotp_plan.runtime.loading.weights import open_weights
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.folder import read_shards
from tests.helpers import quantized
from tests.helpers.launch import launch
from tests.helpers.quantized import Made

BLOCK = (24, 40)
FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
TIGHT = 1e-5


def fp8(name: str, values: torch.Tensor) -> Made | None:
    return quantized.as_fp8(name, values, BLOCK) if name.endswith("_proj.weight") or "kv_a_proj" in name else None


def mxfp4(name: str, values: torch.Tensor) -> Made | None:
    return quantized.as_mxfp4(name, values) if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else None


MODELS: dict[str, Any] = {
    "deepseek_v3": (FP8, fp8, {"num_attention_heads": 8}),
    "gpt_oss": ({"quant_method": "mxfp4"}, mxfp4, {"intermediate_size": 96}),
}


def prepare(work: Path, name: str, tp_size: int = 2) -> Plan:
    """The quantised model in `work / name`, the values of its weights in bf16 in `plain`, and its plan."""
    from tests.helpers.models import save_checkpoint

    settings, make, changes = MODELS[name]
    folder = work / name
    if not folder.exists():
        save_checkpoint(work / f"{name}-before", name, torch.bfloat16, **changes)
        quantized.quantize(work / f"{name}-before", folder, settings, make)
    plan = compile_plan(folder, tp_size=tp_size)
    (work / f"{name}.json").write_text(plan.to_json())
    return plan


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_of_every_size_has_its_share_of_the_plain_weights(tmp_path: Path, name: str) -> None:
    """Presplit, read straight from the quantised checkpoint, merged: as from the checkpoint in bf16."""
    from tests.helpers.models import load_dense

    for tp_size in (1, 2, 8):
        plan = prepare(tmp_path, name, tp_size)
        plain = compile_plan(tmp_path / name / "plain", tp_size=tp_size)
        assert (plan.parameters, plan.layouts, plan.model) == (plain.parameters, plain.layouts, plain.model)
        assert plan.dequantize is not None
        presplit(plan, tmp_path / name, tmp_path / f"{name}-{tp_size}")
        presplit(plain, tmp_path / name / "plain", tmp_path / f"plain-{tp_size}")
        check_shards(tmp_path / f"{name}-{tp_size}")
        found, wanted = read_shards(tmp_path / f"{name}-{tp_size}"), read_shards(tmp_path / f"plain-{tp_size}")
        files: dict[Any, Any] = {}
        for key, entry in wanted.tensors.items():
            both = [files.setdefault(one.file, load_file(Path(str(one.file)))) for one in (found.tensors[key], entry)]
            assert torch.equal(both[0][found.tensors[key].name], both[1][entry.name]), key
        straight = open_weights(tmp_path / name, plan)
        for rank in range(tp_size):
            for weight in straight.of_rank(rank):
                entry = wanted.tensors[weight.name, rank]
                read = read_weight(weight, torch.device("cpu"), None)
                assert torch.equal(read, files[entry.file][entry.name]), (weight.name, rank)
    merge(tmp_path / f"{name}-8", tmp_path / "merged")
    plain_files = sorted((tmp_path / name / "plain").glob("*.safetensors"))
    written = {k: v for path in sorted((tmp_path / "merged").glob("*.safetensors")) for k, v in load_file(path).items()}
    expected = {k: v for path in plain_files for k, v in load_file(path).items()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    model = load_dense(tmp_path / "merged", "auto")
    assert not hasattr(model.config, "quantization_config")
    dense = load_dense(tmp_path / name / "plain", "auto").state_dict()
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())


FROM = {"deepseek_v3": "shards", "gpt_oss": "gpt_oss"}


def trained(work: Path) -> dict[str, Any]:
    """Inside a rank: losses and gradient norms; of one model from shards, of one straight from the checkpoint."""
    from autotp_plan.runtime import load_plan
    from tests.helpers import parity

    found = {}
    for name in MODELS:
        plan = load_plan(work / f"{name}.json")
        model = plan.load_model(work / FROM[name], dtype=torch.float32)
        assert not hasattr(model.config, "quantization_config")
        found[name] = parity.engine_steps(plan, model, 1)
    return found


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_training_is_that_of_the_dense_model_with_the_plain_weights(tmp_path: Path) -> None:
    """And not that of the weights before they were quantised."""
    from tests.helpers import parity
    from tests.helpers.models import load_dense

    dense, before = {}, {}
    for name in MODELS:
        plan = prepare(tmp_path, name)
        if FROM[name] == "shards":
            presplit(plan, tmp_path / name, tmp_path / "shards")
        dense[name] = torch.tensor(parity.dense_steps(load_dense(tmp_path / name / "plain")))
        before[name] = torch.tensor(parity.dense_steps(load_dense(tmp_path / f"{name}-before")))
    for found in launch(trained, 2, tmp_path):
        for name, steps in found.items():
            relative = (torch.tensor(steps) / dense[name] - 1).abs().max()
            assert relative < TIGHT, (name, steps, dense[name])
            assert (torch.tensor(steps) / before[name] - 1).abs().max() > 10 * TIGHT
