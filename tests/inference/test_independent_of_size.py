"""A spec file that was inferred from one size of a family plans every other size, as its own does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotp_plan.inference.infer import infer_rules, infer_spec
from tests.helpers.paths import PLANS
from tests.inference.test_infer import config_folder, facts, inferred

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = {
    "llama": "llama_3_1_8b",
    "qwen3": "qwen3_8b",
    "phi3": "phi_3_medium",
    "gpt_neox": "pythia_6_9b",
    "falcon_grouped": "falcon_40b",
    "gemma2": "gemma_2_9b",
    "qwen3_moe": "qwen3_30b_a3b",
    "gpt_oss": "gpt_oss_20b",
}
"""A small config, and a public model of the same family."""
SLOW = {"qwen3", "gemma2", "gpt_oss", "qwen3_moe"}
"""Of experts, `test_inferred_rules_hold_for_other_sizes` has DeepSeek's."""


@pytest.mark.parametrize(
    "variant", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in FAMILIES]
)
def test_rules_of_one_size_hold_for_the_other(tmp_path: Path, variant: str) -> None:
    small, large = config_folder(tmp_path, variant), PLANS / FAMILIES[variant]
    of_small, of_large = infer_rules(small), infer_rules(large)
    for folder in (small, large):
        for tp_size in (2,) if variant == "phi3" else (2, 4):  # ten key-value heads
            by_small, by_large = (facts(inferred(folder, tp_size, rules)) for rules in (of_small, of_large))
            assert by_small == by_large


def test_rules_of_shared_heads_hold_where_none_is_shared_and_the_reverse(tmp_path: Path) -> None:
    """Phi-3-mini has as many key-value heads as heads; its small models have fewer, as other sizes do."""
    shared, alone = config_folder(tmp_path, "phi3"), PLANS / "phi_3_mini"
    rules = infer_rules(alone)
    assert facts(inferred(alone, 4, infer_rules(shared))) == facts(inferred(alone, 4, rules))
    assert facts(inferred(shared, 2, rules)) == facts(inferred(shared, 2, infer_rules(shared)))


def test_what_shared_heads_would_leave_whole_is_inferred_from_heads_that_share_none(tmp_path: Path) -> None:
    """DiffLlama pairs up its heads of values, which small models with fewer key-value heads cannot be divided by."""
    config = {
        "architectures": ["DiffLlamaForCausalLM"], "model_type": "diffllama", "hidden_size": 128,
        "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2,
        "vocab_size": 320,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    rules = infer_spec(tmp_path)
    sharded = {pattern for rule in rules["layer_specs"] for pattern in rule["patterns"] if "skip" not in rule.values()}
    assert any("o_proj" in pattern for pattern in sharded)
    assert any("down_proj" in pattern for pattern in sharded)
