"""`autotp-plan verify`: proves right plans, catches wrong ones, and leaves a stamp."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autotp_plan.planner import Plan, SpecFile, check_shards, compile_plan, presplit
from autotp_plan.planner.cli.main import main
from autotp_plan.runtime.verify.report import ENGINE_TOLERANCE, FLOAT64_TOLERANCE, Proof
from autotp_plan.runtime.verify.run import verify_plan
from autotp_plan.schemas.errors import DocumentError, MissingDependencyError, OptionError
from autotp_plan.schemas.plan.stamp import Stamp
from tests.helpers.models import save_checkpoint
from tests.helpers.paths import PRESETS

COMMON = {"vocab_size": 257, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 384,
        "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4,
    },
    "phi3": {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 256, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8, "pad_token_id": 0,
    },
    "qwen3": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 256, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 32,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    },
    "bloom": {
        "model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 256, "n_layer": 4, "n_head": 8,
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 128,
        "intermediate_size": 192, "moe_intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 8,
        "num_key_value_heads": 8, "n_routed_experts": 16, "num_experts_per_tok": 2, "n_shared_experts": 2,
        "first_k_dense_replace": 2, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32,
    },
}  # fmt: skip


def config_folder(tmp_path: Path, name: str, **changes: Any) -> Path:
    folder = tmp_path / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**COMMON, **CONFIGS[name], **changes}))
    return folder


def plan_of(tmp_path: Path, name: str, tp_size: int, **changes: Any) -> Plan:
    return compile_plan(config_folder(tmp_path, name, **changes), tp_size=tp_size)


def assert_proven(proof: Proof) -> None:
    assert proof.proven, proof.conclusions()
    assert proof.float64_error < FLOAT64_TOLERANCE and proof.engine_error < ENGINE_TOLERANCE
    assert len(proof.engine) == 6
    for kinds in proof.float64.values():
        assert kinds.keys() == {"loss", "logits", "gradient", "accumulated", "stepped"}
        assert kinds["gradient"].keys() == kinds["stepped"].keys() and len(kinds["gradient"]) > 10


# --- right plans -----------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("name", "tp_size"),
    [
        ("llama", 2),
        pytest.param("phi3", 2, marks=pytest.mark.slow),
        pytest.param("qwen3", 2, marks=pytest.mark.slow),
        pytest.param("deepseek_v2", 2, marks=pytest.mark.slow),  # as DeepSeek-V2-Lite in test_verify_every_plan.py
        ("qwen3", 4),
        ("llama", 8),
    ],
    ids=lambda value: str(value),
)
def test_a_right_plan_is_proven(tmp_path: Path, name: str, tp_size: int) -> None:
    steps: list[str] = []
    proof = verify_plan(plan_of(tmp_path, name, tp_size), progress=steps.append)
    assert_proven(proof)
    assert list(proof.float64) == ["eager", "sdpa"]
    assert len(steps) == 2 and f"{tp_size} ranks" in steps[1]
    assert proof.compute_share == pytest.approx(1 / tp_size, abs=0.1 if name in ("deepseek_v2", "qwen3") else 0.02)


@pytest.mark.distributed
@pytest.mark.timeout(180)
def test_what_every_rank_computes_shows_in_the_compute_share(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, "llama")
    whole = {"patterns": [r".*\.(mlp|self_attn)\..*_proj\.weight$"], "partition_type": "skip"}
    plan = compile_plan(folder, tp_size=2, specs=[SpecFile.from_dict({"layer_specs": [whole]})])
    proof = verify_plan(plan, attention=("eager",))
    assert proof.proven and proof.compute_share is not None and 0.8 < proof.compute_share < 1
    found = proof.to_dict()["compute"]
    assert found["share"] == max(found["ranks"]) / found["dense"] and len(found["ranks"]) == 2
    (line,) = [line for line in proof.conclusions() if line.startswith("compute share")]
    assert f"{proof.compute_share:.2f}" in line and "0.50 if everything is sharded" in line


# --- wrong plans -----------------------------------------------------------------------------------------------------


def qkv_concatenated(tmp_path: Path) -> Plan:
    rules = json.loads((PRESETS / "gpt_neox.json").read_text())
    rules["layer_specs"][0] |= {"shape": [3, -1], "unit": "head_dim"}
    return compile_plan(
        config_folder(tmp_path, "gpt_neox"), tp_size=2, preset="none", specs=[SpecFile.from_dict(rules)]
    )


def partial_gradient_forgotten(tmp_path: Path) -> Plan:
    plan = plan_of(tmp_path, "qwen3", 2)
    without = [dataclasses.replace(entry, partial_gradient=False) for entry in plan.parameters]
    return dataclasses.replace(plan, parameters=tuple(without))


def head_counts_forgotten(tmp_path: Path) -> Plan:
    return dataclasses.replace(plan_of(tmp_path, "phi3", 2), module_attributes=())


def down_proj_of_the_other_rank(tmp_path: Path) -> Plan:
    plan = plan_of(tmp_path, "llama", 2)
    name = next(entry.layout for entry in plan.parameters if "down_proj" in entry.name)
    layout = plan.layouts[name]
    swapped = dataclasses.replace(layout, intervals=layout.intervals[::-1])
    return dataclasses.replace(plan, layouts={**plan.layouts, name: swapped})


def crossings_forgotten(name: str) -> Callable[[Path], Plan]:
    return lambda tmp_path: dataclasses.replace(plan_of(tmp_path, name, 2), modules=())


WRONG: dict[str, Callable[[Path], Plan]] = {
    "qkv concatenated": qkv_concatenated,
    "partial gradient forgotten": partial_gradient_forgotten,
    "head counts forgotten": head_counts_forgotten,
    "down_proj of the other rank": down_proj_of_the_other_rank,
    "alibi not split": crossings_forgotten("bloom"),
    "experts and shared key not summed": crossings_forgotten("deepseek_v2"),
}


@pytest.mark.distributed
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_is_not_proven(tmp_path: Path, name: str) -> None:
    proof = verify_plan(WRONG[name](tmp_path), attention=("eager",))
    assert not proof.proven
    assert proof.failure is not None or proof.float64_error > 1e-4, f"{name} went unnoticed"
    assert "NOT PROVEN" in proof.conclusions()[-1]
    if name == "head counts forgotten":
        assert proof.failure is not None and "RuntimeError" in proof.failure
    if name == "partial gradient forgotten":  # the forward is right, and so are all other gradients
        assert (proof.largest("logits") or 0) < 1 and proof.float64["eager"]["logits"]["pass 1"] < FLOAT64_TOLERANCE
        wrong = {row.name for row in proof.rows() if (row.gradient or 0) > FLOAT64_TOLERANCE}
        assert wrong == {f"model.layers.{{0..3}}.self_attn.{leaf}_norm.weight" for leaf in "qk"}


# --- the command and the stamp ---------------------------------------------------------------------------------------


def run(*arguments: Any, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_verify_prints_the_proof_and_stamps_the_plan(tmp_path: Path) -> None:
    plan, file = plan_of(tmp_path, "llama", 2), tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert "not verified: run `autotp-plan verify`" in run("show", file).stdout
    result = run("verify", file, "--format", "json", "--no-stamp", "--attention", "sdpa")
    found = json.loads(result.stdout)
    assert found["proven"] is True and list(found["float64"]["errors"]) == ["sdpa"]
    assert found["versions"].keys() == {"autotp-plan", "torch", "transformers", "deepspeed"}
    assert file.read_text() == plan.to_json()

    text = run("verify", file).stdout
    assert "LlamaForCausalLM at TP=2, as a small model of the same architecture: widths divided by 4, 2 layers" in text
    assert "model.layers.{0..5}.mlp.up_proj.weight" in text and "eager and sdpa attention" in text
    stamped = Plan.read(file)
    assert stamped.fingerprint == plan.fingerprint and dataclasses.replace(stamped, verified=None) == plan
    assert stamped.verified is not None and stamped.verified.float64_error < FLOAT64_TOLERANCE
    assert "verified: eager and sdpa attention, errors up to" in run("show", file).stdout

    folder = save_checkpoint(tmp_path / "checkpoint", "llama")
    shards = tmp_path / "shards"
    presplit(compile_plan(folder, tp_size=2), folder, shards)
    assert "not stamped: the plan is part of a shards folder" in run("verify", shards / "autotp_plan.json").stderr
    check_shards(shards)


@pytest.mark.distributed
@pytest.mark.timeout(180)
def test_verify_of_a_wrong_plan_fails_and_does_not_stamp(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(head_counts_forgotten(tmp_path).to_json())
    before = file.read_text()
    result = run("verify", file, "--format", "json", status=1)
    found = json.loads(result.stdout)
    assert found["proven"] is False and "RuntimeError" in found["failure"]
    assert found["float64"]["largest"] is None
    assert file.read_text() == before


def test_verify_without_the_runtime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, "llama", 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'autotp-plan\[train\]'"):
        verify_plan(plan)


@pytest.mark.distributed
@pytest.mark.timeout(180)
def test_a_plan_without_a_config_cannot_be_verified(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "llama", 2)
    file = tmp_path / "plan.json"
    file.write_text(dataclasses.replace(plan, model=dataclasses.replace(plan.model, config=None)).to_json())
    assert "only a model of transformers can be verified" in run("verify", file, status=2).output


@pytest.fixture
def stamp() -> Stamp:
    versions = {"autotp-plan": "0.1.0", "torch": "2.13.0"}
    return Stamp(plan="", versions=versions, attention=("eager",), float64_error=2e-15, engine_error=3e-7)


def test_a_stamp_does_not_change_the_fingerprint(tmp_path: Path, stamp: Stamp) -> None:
    plan = plan_of(tmp_path, "llama", 2)
    stamped = dataclasses.replace(plan, verified=dataclasses.replace(stamp, plan=plan.fingerprint))
    assert stamped.fingerprint == plan.fingerprint
    file = tmp_path / "plan.json"
    file.write_text(stamped.to_json())
    assert Plan.read(file) == stamped and Plan.read(file).to_json() == stamped.to_json()
    line = "verified: eager attention, errors up to 2.0e-15 (float64) and 3.0e-07 (engine, float32); "
    assert line + "autotp-plan 0.1.0, torch 2.13.0" in run("show", file).stdout


def test_the_stamp_of_another_plan_is_refused(tmp_path: Path, stamp: Stamp) -> None:
    plan, other = plan_of(tmp_path, "llama", 2), plan_of(tmp_path, "llama", 4)
    forged = dataclasses.replace(plan, verified=dataclasses.replace(stamp, plan=other.fingerprint))
    with pytest.raises(DocumentError) as caught:
        Plan.from_dict(forged.to_dict())
    assert [(fault.what, fault.where) for fault in caught.value.faults] == [
        ("the plan bears the stamp of another plan", "verified.plan")
    ]


@pytest.mark.distributed
@pytest.mark.timeout(180)
def test_steps_of_another_optimizer_are_compared(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "llama", 2)
    for optimizer in ("muon", "transformers.Adafactor"):
        proof = verify_plan(plan, attention=("eager",), optimizer=optimizer)
        assert proof.proven, (optimizer, proof.conclusions())
    for unknown in ("nothing", "lbfgs", "no.such.module.Adam"):
        with pytest.raises(OptionError, match="there is no such optimizer"):
            verify_plan(plan, attention=("eager",), optimizer=unknown)
