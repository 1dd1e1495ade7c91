"""Inferred spec files with one rule changed by hand, in ways that are sound arithmetic: `verify` catches each.

Every plan passes the checks of a plan. What `verify` does is done here in one pair of ranks for all cases.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.spec import SpecFile
from tests.helpers.launch import launch
from tests.helpers.mixers import CONFIGS, mixer_folder
from tests.inference.test_infer import config_folder, inferred

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270), pytest.mark.filterwarnings("ignore")]

Change = Callable[[dict[str, Any]], None]


def rule(ending: str, **changes: Any) -> Change:
    """Change the rules whose patterns contain `ending`; keys that are None go."""

    def change(spec: dict[str, Any]) -> None:
        every = [*spec["layer_specs"], *spec["vocabulary_specs"]]
        found = [one for one in every if any(ending in pattern for pattern in one["patterns"])]
        assert found, ending
        for one in found:
            one.update(changes)
            for key in [key for key, value in one.items() if value is None]:
                del one[key]

    return change


def whole(*endings: str) -> Change:
    """Rules that are gone, and a rule that leaves these weights whole."""

    def change(spec: dict[str, Any]) -> None:
        patterns = []
        for section in ("layer_specs", "vocabulary_specs"):
            for one in spec[section]:
                moved = [pattern for pattern in one["patterns"] if any(ending in pattern for ending in endings)]
                patterns += moved
                one["patterns"] = [pattern for pattern in one["patterns"] if pattern not in moved]
            spec[section] = [one for one in spec[section] if one["patterns"]]
        assert len(patterns) == len(endings)
        spec["layer_specs"].append({"patterns": patterns, "partition_type": "skip"})

    return change


def inputs(**kept: Any) -> Change:
    """Modules with these inputs alone."""

    def change(spec: dict[str, Any]) -> None:
        (module,) = (one for one in spec["modules"] if "inputs" in one)
        module["inputs"] = kept

    return change


def attributes(**values: str) -> Change:
    """Attributes of modules with other values."""

    def change(spec: dict[str, Any]) -> None:
        (entry,) = spec["module_attributes"]
        assert values.keys() <= entry["attributes"].keys()
        entry["attributes"].update(values)

    return change


def without(section: str) -> Change:
    """The spec file without one of its sections."""

    def change(spec: dict[str, Any]) -> None:
        assert spec.pop(section)

    return change


QKV = {"shape": [["hidden_size + 2 * head_dim * num_key_value_heads"], -1], "unit": 32, "indivisible": "error"}
GATE_UP = {"shape": [["2 * intermediate_size"], -1], "unit": 2}
SPLIT_Q = [["num_kv_heads * head_dim * 2", "num_kv_heads * head_dim", "num_kv_heads * head_dim"], -1]
WRONG: dict[str, tuple[str, Change]] = {
    "llama: every other KV head": ("llama", rule("k_proj", shape=[2, -1])),
    "llama: every other head of the output": (
        "llama", rule("o_proj", shape=[-1, 2], unit="head_dim"),
    ),
    "llama: a table in columns": ("llama", rule("embed_tokens", partition_type="column", gather_output=True)),
    "phi3: q, k and v contiguous": ("phi3", rule("qkv_proj", **QKV)),
    "phi3: gate and up contiguous": ("phi3", rule("gate_up_proj", **GATE_UP)),
    "gpt_neox: [Q; K; V]": ("gpt_neox", rule("query_key_value", shape=[3, -1], unit="head_dim")),
    "falcon: [Q; K; V]": ("falcon_grouped", rule("query_key_value", shape=SPLIT_Q, unit="head_dim")),
    "falcon: a table of ALiBi for all heads": ("falcon_alibi", without("modules")),
    "falcon: all heads counted": (
        "falcon_grouped", attributes(num_heads="num_attention_heads", num_kv_heads="num_kv_heads"),
    ),
    "qwen3_moe: norms of heads not summed": ("qwen3_moe", rule("q_norm", grad_allreduce=False)),
    "qwen3_moe: routing weights not summed": ("qwen3_moe", inputs(hidden_states="copy")),
    "qwen3_moe: gate and up contiguous": ("qwen3_moe", rule("gate_up_proj", shape=None)),
    "gpt_oss: [gate; up]": (
        "gpt_oss", rule("gate_up_proj$", shape=[-1, -1, ["intermediate_size", "intermediate_size"]], unit=1),
    ),
    "deepseek_v2: the shared key not summed": ("deepseek_v2", lambda spec: spec["modules"].pop(0)),
    "deepseek_v2: heads of keys before those of values": (
        "deepseek_v2",
        rule("kv_b_proj", unit=["qk_nope_head_dim", "v_head_dim"],
             shape=[["num_attention_heads * qk_nope_head_dim", "num_attention_heads * v_head_dim"], -1]),
    ),
    "jamba: what x_proj gives not summed backward": ("jamba", without("modules")),
    "jamba: norms of dt, B and C not summed": ("jamba", rule("dt_layernorm", grad_allreduce=False)),
}  # fmt: skip
RIGHT: dict[str, tuple[str, Change]] = {
    "llama": ("llama", lambda spec: None),
    "jamba": ("jamba", lambda spec: None),
    "llama: the MLP whole": ("llama", whole("gate_proj", "up_proj", "down_proj")),
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for each case."""
    from autotp_plan.inference.infer import infer_spec

    work = tmp_path_factory.mktemp("planted")
    specs: dict[str, dict[str, Any]] = {}
    for place, (variant, change) in enumerate([*WRONG.values(), *RIGHT.values()]):
        folder = work / variant
        if variant not in specs:
            folder.mkdir()
            config = mixer_folder(folder, variant) if variant in CONFIGS else config_folder(folder, variant)
            specs[variant] = infer_spec(config)
        spec = copy.deepcopy(specs[variant])
        change(spec)
        plan = inferred(folder, 2, SpecFile.from_dict(spec))
        (work / f"{place}.json").write_text(plan.to_json())
    return work


def proofs(work: Path) -> dict[str, str]:
    """Inside a rank: what `verify` does for every plan, and what it finds."""
    import torch

    from autotp_plan.runtime.verify.dense import write_twin
    from autotp_plan.runtime.verify.report import FLOAT64_TOLERANCE
    from autotp_plan.runtime.verify.sharded import run_rank

    rank = torch.distributed.get_rank()
    found: dict[str, str] = {}
    for place, case in enumerate([*WRONG, *RIGHT]):
        folder = work / f"twin-{place}"
        refused = [None]
        if rank == 0:
            folder.mkdir()
            try:
                write_twin(Plan.read(work / f"{place}.json"), folder, ("eager",))
            except Exception as error:  # refused before any rank is started
                refused = [f"{type(error).__name__}: {error}"]  # type: ignore[list-item]
        torch.distributed.broadcast_object_list(refused)
        if refused[0] is not None:
            found[case] = refused[0]
            continue
        try:
            run_rank(folder)
        except Exception as error:  # whatever a forward raises on shapes that do not fit
            found[case] = f"{type(error).__name__}: {error}"
            continue
        errors = json.loads((folder / f"eager.rank-{rank}.json").read_text())
        worst = max(error for kind in errors.values() for error in kind.values())
        found[case] = "" if worst <= FLOAT64_TOLERANCE else f"off by {worst:.1e}"
    return found


@pytest.fixture(scope="module")
def caught(plans: Path) -> dict[str, str]:
    first, second = launch(proofs, 2, plans)
    return {case: first[case] or second[case] for case in first}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_changed_rule_is_caught(caught: dict[str, str], case: str) -> None:
    assert caught[case], "went unnoticed"


@pytest.mark.parametrize("case", list(RIGHT))
def test_what_is_right_is_proven(caught: dict[str, str], case: str) -> None:
    assert not caught[case]
