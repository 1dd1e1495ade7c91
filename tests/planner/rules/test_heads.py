"""Messages about sizes that do not divide name heads, KV heads and groups, and units only where they are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.planner.rules.heads import describe_units
from autotp_plan.planner.rules.symbols import Symbols
from autotp_plan.schemas.errors import CompileError
from autotp_plan.schemas.layout import SubParameter
from autotp_plan.schemas.spec import Spec
from tests.helpers.checkpoints import LLAMA_CONFIG, llama_shapes, write_checkpoint, write_llama
from tests.helpers.models import make_config

SYMBOLS = Symbols(
    config={"num_heads": 8, "num_kv_heads": 2, "head_dim": 4, "block": 16},
    definitions={"group": ("num_heads // num_kv_heads",), "q_unit": ("group * head_dim",)},
)


@pytest.mark.parametrize(
    ("partition_type", "unit", "size", "resolved", "text"),
    [
        ("column", "head_dim", 32, 4, "8 heads of 4 rows"),
        ("row", "head_dim", 32, 4, "8 heads of 4 columns"),
        ("column", "3 * head_dim", 96, 12, "8 heads of 12 rows"),
        ("column", "head_dim", 8, 4, "2 KV heads of 4 rows"),
        ("column", "q_unit", 32, 16, "2 groups of 4 heads (16 rows each)"),
        ("column", "q_unit", 32, 32, "1 group of 8 heads (32 rows each)"),
        ("column", ("block", "head_dim"), 8, 4, "2 KV heads of 4 rows"),
        ("column", "block", 32, 16, "2 units of 16"),
        ("column", 16, 32, 16, "2 units of 16"),
        ("column", None, 63, 1, "63"),
    ],
)
def test_units_have_names(partition_type: Any, unit: Any, size: int, resolved: int, text: str) -> None:
    spec = Spec(patterns=(), partition_type=partition_type, unit=unit)
    position = 1 if isinstance(unit, tuple) else 0
    assert describe_units(spec, position, SubParameter(size=size, unit=resolved), SYMBOLS, 2) == text


def got(folder: Path, tp_size: int, **options: Any) -> dict[str, str]:
    with pytest.raises(CompileError) as caught:
        compile_plan(folder, tp_size=tp_size, **options)
    return {fault.where.split(" (")[0].rpartition("layers.{0..1}.")[2]: fault.got for fault in caught.value.faults}


def test_a_llama_over_three_ranks(tmp_path: Path) -> None:
    found = got(write_llama(tmp_path / "llama"), 3)
    assert found["self_attn.k_proj.weight"] == "4 KV heads of 4 rows over 3 ranks"
    assert found["self_attn.q_proj.weight"] == "4 groups of 2 heads (8 rows each) over 3 ranks"
    assert found["self_attn.o_proj.weight"] == "4 groups of 2 heads (8 columns each) over 3 ranks"


def test_as_many_kv_heads_as_heads_are_heads(tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "num_key_value_heads": LLAMA_CONFIG["num_attention_heads"]}
    found = got(write_checkpoint(tmp_path / "mha", llama_shapes(config), config), 3)
    assert found["self_attn.k_proj.weight"] == found["self_attn.q_proj.weight"] == "8 heads of 4 rows over 3 ranks"


def test_a_users_rule_says_units_of_its_own_integer(tmp_path: Path) -> None:
    spec = SpecFile.from_dict({"layer_specs": [
        {"patterns": [r".*\.k_proj\.weight$"], "partition_type": "column", "unit": 8}]})  # fmt: skip
    assert (
        got(write_llama(tmp_path / "llama"), 8, specs=[spec])["self_attn.k_proj.weight"] == "2 units of 8 over 8 ranks"
    )


def test_fused_weights_name_the_matrix_that_does_not_divide(tmp_path: Path) -> None:
    values = make_config("phi3").to_dict() | {"architectures": ["Phi3ForCausalLM"]}

    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "heads" in got(tmp_path, 3)["self_attn.qkv_proj.weight"]
