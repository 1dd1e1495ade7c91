"""`verify` proves every plan in `plans/` and every preset, at TP 2, 4 and 8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotp_plan.schemas.plan.document import Plan
from tests.helpers.models import PRESET_VARIANTS
from tests.helpers.paths import PLANS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

QUICK = {
    "bloom_176b/tp4", "deepseek_v2_lite/tp2", "falcon_40b/tp2", "gpt_oss_20b/tp2", "olmo_2_7b/tp2",
    "phi_3_medium/tp4", "qwen2_5_0_5b/tp2",
}  # fmt: skip
"""What a small model is hardest to make for: ALiBi, latent attention, groups, experts with sinks, norms over a whole
width, KV heads that are not divided evenly, tied tables. The others are for `make test-all`; of every family
`tests/runtime/test_parity_with_dense.py` has a plan.
"""
FOUR_HEADS = {"codegen", "falcon_grouped"}
SLOW = pytest.mark.slow


def plans() -> list[object]:
    found = sorted(path.relative_to(PLANS).with_suffix("").as_posix() for path in PLANS.glob("*/tp*.json"))
    assert set(found) >= QUICK
    return [name if name in QUICK else pytest.param(name, marks=SLOW) for name in found]


def prove(plan: Plan) -> None:
    from autotp_plan.runtime import verify_plan

    proof = verify_plan(plan)
    assert proof.proven, (proof.failure, proof.wrong, proof.float64_error, proof.engine_error)


@pytest.mark.parametrize("name", plans())
def test_plans_of_public_models_are_proven(name: str) -> None:
    prove(Plan.read(PLANS / f"{name}.json"))


@SLOW
@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize("variant", PRESET_VARIANTS)
def test_every_preset_is_proven(tmp_path: Path, variant: str, tp_size: int) -> None:
    from autotp_plan.planner import compile_plan
    from autotp_plan.schemas.errors import CompileError
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(tmp_path / "checkpoint", variant)
    if tp_size == 8 and variant in FOUR_HEADS:
        with pytest.raises(CompileError, match="does not divide"):
            compile_plan(folder, tp_size=tp_size)
    else:
        prove(compile_plan(folder, tp_size=tp_size))


def stable_lm(folder: Path) -> Path:
    """A family without a preset and without a tp_plan."""
    values = {
        "architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "hidden_size": 128,
        "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2,
        "vocab_size": 300, "use_qkv_bias": True,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_spec_file_from_the_skeleton_is_proven_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    """The skeleton that `compile` shows, filled in right and wrong."""
    from autotp_plan.planner import SpecFile, compile_plan
    from autotp_plan.runtime import verify_plan
    from autotp_plan.schemas.errors import CompileError

    folder = stable_lm(tmp_path / "model")
    with pytest.raises(CompileError) as refused:
        compile_plan(folder, tp_size=2)
    skeleton = refused.value.faults[0].next
    rows = json.loads(skeleton[skeleton.index("{") :])["layer_specs"]
    assert len(rows) == 9, "embedding and head too"
    for row in rows:
        (pattern,) = row["patterns"]
        if row["partition_type"] == "column | row | skip":
            row["partition_type"] = "row" if "o_proj" in pattern or "down_proj" in pattern else "column"
        if "self_attn" in pattern:
            row["unit"] = 16
    forgotten = verify_plan(compile_plan(folder, tp_size=2, specs=[SpecFile.from_dict({"layer_specs": rows})]))
    assert not forgotten.proven and "invalid for input of size" in str(forgotten.failure), "the head counts are whole"
    counts = {"num_heads": "share(num_attention_heads)", "num_key_value_heads": "share(num_key_value_heads)"}
    attributes = [{"patterns": [r".*\.self_attn$"], "attributes": counts}]
    rules = {"layer_specs": rows, "module_attributes": attributes}
    prove(compile_plan(folder, tp_size=2, specs=[SpecFile.from_dict(rules)]))
