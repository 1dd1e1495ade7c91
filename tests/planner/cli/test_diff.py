"""The command `diff`: what it prints of plans, folders of shards and checkpoints, and its exit status."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autotp_plan.planner import compile_plan, presplit
from autotp_plan.planner.cli.main import main
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.checkpoints import LLAMA_CONFIG, llama_shapes, write_checkpoint, write_llama
from tests.helpers.paths import PLANS, ROOT
from tests.planner.diff.documents import EVERYTHING, plan_of


def diff(*arguments: Any, status: int) -> Result:
    result = CliRunner().invoke(main, ["diff", *map(str, arguments)])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def words(result: Result) -> list[str]:
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama")


@pytest.fixture
def plan_file(llama: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(compile_plan(llama, tp_size=2).to_json())
    return path


def test_a_spec_that_replicates_one_weight(llama: Path, plan_file: Path, tmp_path: Path) -> None:
    spec, other = tmp_path / "spec.json", tmp_path / "other.json"
    spec.write_text('{"layer_specs": [{"patterns": [".*lm_head.weight"], "partition_type": "skip"}]}')
    arguments = ["compile", "--model", llama, "--tp", 2, "--spec", spec, "-o", other]
    assert CliRunner().invoke(main, [str(one) for one in arguments]).exit_code == 0
    assert words(diff(plan_file, other, status=1)) == [
        f"--- {plan_file}: LlamaForCausalLM at TP=2, 21 parameters in BF16",
        f"+++ {other}: LlamaForCausalLM at TP=2, 21 parameters in BF16",
        "name what old new",
        "lm_head.weight style column, gathered replicated",
        "each rank holds 1/2 of dim 0 all",
        "per rank 2.00 KiB 4.00 KiB",
        "rule preset llama vocabulary #2 spec file #1",
        "each rank holds: 19.31 KiB -> 21.31 KiB",
        "replicated on every rank: 320 B -> 4.31 KiB",
        "copies over all ranks: 320 B -> 4.31 KiB",
        "+ computed in full on every rank: lm_head",
        "compiled by: none -> 1 spec file",
        "1 of 21 parameters differ in what a rank holds or computes",
    ]


def test_equal_plans_have_status_0(plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.json").write_text(json.dumps(json.loads(plan_file.read_text())))
    assert words(diff(plan_file, tmp_path / "copy.json", status=0))[-1] == "no difference"
    text = diff(plan_file, tmp_path / "copy.json", "--format", "json", status=0).stdout
    document = json.loads(text)
    assert text == json.dumps(document, indent=1) + "\n"
    assert document["equal"] is document["computes_the_same"] is True
    assert document["differences"] == []
    assert document["old"] == document["new"]


def test_json_is_a_contract(plan_file: Path, llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(compile_plan(llama, tp_size=4).to_json())
    text = diff(plan_file, other, "--format", "json", status=1).stdout
    document = json.loads(text)
    assert text == json.dumps(document, indent=1) + "\n"
    assert list(document) == ["equal", "computes_the_same", "old", "new", "differences"]
    assert document["old"] == {
        "headline": "LlamaForCausalLM at TP=2, 21 parameters in BF16", "fingerprint": Plan.read(plan_file).fingerprint,
    }  # fmt: skip
    assert document["differences"][0] == {
        "of": "plan", "name": "tp_size", "count": 1, "kind": "changed",
        "fields": [{"field": "value", "old": 2, "new": 4}],
    }  # fmt: skip
    by_name = {one["name"]: one for one in document["differences"]}
    assert by_name["model.layers.{0..1}.mlp.down_proj.weight"] == {
        "of": "parameter", "name": "model.layers.{0..1}.mlp.down_proj.weight", "count": 2, "kind": "changed",
        "fields": [
            {"field": "held", "old": {"dim": 1, "size": 48, "intervals": [[[0, 24]], [[24, 48]]]},
             "new": {"dim": 1, "size": 48, "intervals": [[[0, 12]], [[12, 24]], [[24, 36]], [[36, 48]]]}},
            {"field": "bytes_per_rank", "old": 3072, "new": 1536},
        ],
    }  # fmt: skip


def test_a_folder_of_shards_is_its_plan(plan_file: Path, llama: Path, tmp_path: Path) -> None:
    presplit(Plan.read(plan_file), llama, tmp_path / "shards")
    assert words(diff(tmp_path / "shards", plan_file, status=0))[-1] == "no difference"


def test_a_checkpoint_that_the_plan_is_for(plan_file: Path, llama: Path) -> None:
    result = diff(plan_file, llama, status=0)
    assert words(result)[1:] == [
        f"+++ {llama}: LlamaForCausalLM, a checkpoint of 21 tensors in BF16", "no difference",
    ]  # fmt: skip
    assert words(diff(llama, plan_file, status=0))[-1] == "no difference"


def test_a_checkpoint_that_differs(plan_file: Path, tmp_path: Path) -> None:
    shapes = llama_shapes()
    del shapes["model.norm.weight"]
    shapes |= {"lm_head.weight": (80, 32), "extra.weight": (2,)}
    shapes |= {f"model.layers.{layer}.mlp.extra.weight": (2,) for layer in range(2)}
    config = {**LLAMA_CONFIG, "vocab_size": 80, "rope_theta": 1.5}
    other = write_checkpoint(
        tmp_path / "other", shapes, config, dtype={"model.layers.1.self_attn.q_proj.weight": "F16"}
    )
    expected = [
        "config.rope_theta - 1.5",
        "config.vocab_size 64 80",
        "model.norm.weight tensor BF16 of [32] -",
        "lm_head.weight tensor BF16 of [64, 32] BF16 of [80, 32]",
        "extra.weight tensor - not in the plan",
        "model.layers.1.",
        "self_attn.q_proj.weight tensor BF16 of [32, 32] F16 of [32, 32]",
        "model.layers.{0..1}.",
        "mlp.extra.weight tensor - not in the plan",
    ]
    lines = words(diff(plan_file, other, status=1))
    assert sorted(lines[3:-1]) == sorted(expected)
    assert lines[-1] == "the model is not the one that the plan is for"
    turned = words(diff(other, plan_file, status=1))
    assert "lm_head.weight tensor BF16 of [80, 32] BF16 of [64, 32]" in turned
    assert "extra.weight tensor not in the plan -" in turned
    assert turned[0].startswith(f"--- {other}: LlamaForCausalLM, a checkpoint of 23 tensors")


def test_a_bare_config(tmp_path: Path) -> None:
    """The model of a config.json, which has no weights: its parameters and the config."""
    model = PLANS / "qwen2_5_0_5b"
    assert words(diff(model / "tp2.json", model, status=0))[1:] == [
        f"+++ {model}: Qwen2ForCausalLM, a config of 290 parameters in BF16", "no difference",
    ]  # fmt: skip
    config = json.loads((model / "config.json").read_text())
    changed = {"num_hidden_layers": 23, "intermediate_size": 4000, "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    lines = words(diff(model / "tp2.json", tmp_path, status=1))
    assert "config.num_hidden_layers 24 23" in lines
    layers = lines.index("model.layers.{0..22}.")
    expected = [
        "input_layernorm.weight dtype BF16 F16",
        "mlp.down_proj.weight shape 896 x 4864 896 x 4000",
        "dtype BF16 F16",
    ]
    assert lines[layers + 1 : layers + 4] == expected
    assert lines[lines.index("model.layers.23.") + 1].startswith("input_layernorm.weight removed 896, BF16")
    (tmp_path / "config.json").write_text('{"model_type": "unknown"}')
    assert "transformers does not have this model" in diff(model / "tp2.json", tmp_path, status=2).stderr


def test_a_tied_weight_with_values_of_its_own(tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "tie_word_embeddings": True}
    plan_file = tmp_path / "plan.json"
    tied = write_checkpoint(tmp_path / "tied", llama_shapes(config), config)
    plan_file.write_text(compile_plan(tied, tp_size=2).to_json())
    untied = write_checkpoint(tmp_path / "untied", llama_shapes(), config)
    expected = "lm_head.weight values the values of model.embed_tokens.weight, or no such tensor other values than"
    assert f"{expected} model.embed_tokens.weight" in words(diff(plan_file, untied, status=1))


def test_bad_input_has_status_2(plan_file: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "edited.json").write_text(plan_file.read_text().replace('"BF16"', '"F16"'))
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ((plan_file, tmp_path / "none.json"), "cannot read the plan"),
        ((plan_file, tmp_path / "edited.json"), "the plan was changed after it was compiled"),
        ((plan_file, tmp_path / "empty"), "error:"),
        ((plan_file, tmp_path / "none"), "error:"),
        ((llama, llama), "neither of the two is a plan"),
        ((plan_file,), "Missing argument 'NEW'"),
    ):
        result = diff(*arguments, status=2)
        assert said in result.stderr, result.stderr
        assert result.stdout == ""
    both = diff(tmp_path / "edited.json", tmp_path / "none.json", status=2).stderr
    assert "cannot read the plan" in both
    assert "changed after it was compiled" in both


def test_two_checkpoints_are_compared_by_the_plan_of_one(llama: Path, tmp_path: Path) -> None:
    """What the error of two checkpoints proposes."""
    shutil.copytree(llama, tmp_path / "other")
    message = diff(llama, tmp_path / "other", status=2).stderr
    proposed = "autotp-plan compile --model CHECKPOINT --tp 2 -o plan.json"
    assert proposed in message
    arguments = proposed.split()[1:]
    places = {"CHECKPOINT": str(llama), "plan.json": str(tmp_path / "plan.json")}
    assert CliRunner().invoke(main, [places.get(one, one) for one in arguments]).exit_code == 0
    diff(tmp_path / "plan.json", tmp_path / "other", status=0)


def test_the_output_in_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PLANS / "llama_3_1_70b")
    output = "".join(f"{line.rstrip()}\n" for line in diff("tp8.json", "tp16.json", status=1).stdout.splitlines())
    assert f"```text\n{output}```\n" in (ROOT / "docs" / "plan-format.md").read_text(encoding="utf-8")


def test_names_that_act_on_a_terminal_are_visible(tmp_path: Path) -> None:
    for name in ("old", "new"):
        note = f"[red]{name}\x1b[2J"
        (tmp_path / f"{name}.json").write_text(plan_of({**EVERYTHING, "notes": [note]}).to_json())
    output = diff(tmp_path / "old.json", tmp_path / "new.json", status=1).stdout
    assert "- note: [red]old\\x1b[2J" in output
    assert "+ note: [red]new\\x1b[2J" in output


@pytest.mark.parametrize("model", ["llama_3_1_405b", "deepseek_v3"])
def test_the_largest_plans_take_less_than_a_second(model: str) -> None:
    started = time.process_time()
    output = diff(PLANS / model / "tp8.json", PLANS / model / "tp16.json", status=1).stdout
    assert time.process_time() - started < 1
    assert "tp_size" in output
