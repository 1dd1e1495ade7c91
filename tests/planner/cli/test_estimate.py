"""`autotp-plan estimate`: what it prints, its exit status, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autotp_plan.planner.cli.estimate import size_in_bytes
from autotp_plan.planner.cli.main import main
from autotp_plan.schemas.errors import OptionError
from tests.helpers.paths import PLANS

LLAMA = str(PLANS / "llama_3_1_8b" / "tp4.json")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["estimate", LLAMA, *arguments])


def test_of_the_plan_alone() -> None:
    result = run("--no-run", "--dp-size", "4", "--zero-stage", "3")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM at TP=4 x DP=4, ZeRO 3, 1 x 4096 tokens, bf16, adamw" in result.output
    assert "all-gather over the data-parallel ranks" in result.output
    assert "not in it: activations" in result.output


@pytest.mark.parametrize(("memory", "status"), [("80GB", 0), ("16GB", 1), ("34.5GiB", 0), ("5e9", 2), ("0GB", 2)])
def test_whether_it_fits(memory: str, status: int) -> None:
    result = run("--no-run", "--memory", memory)
    assert result.exit_code == status, result.output
    assert {0: "fits: ", 1: "does not fit: ", 2: "error: "}[status] in result.output


def test_as_json() -> None:
    document = json.loads(run("--no-run", "--memory", "80GB", "--format", "json").stdout)
    (ranks,) = document["ranks"]
    assert ranks["tp_ranks"] == [0, 1, 2, 3] and ranks["peak"] == sum(part["bytes"] for part in ranks["at_peak"])
    assert document["memory"] == {"bytes": 80 * 10**9, "margin": 80 * 10**9 - ranks["peak"]}
    assert document["settings"]["tp_size"] == 4 and document["measured"] is False


def test_options_go_before_a_ds_config(tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}))
    settings = json.loads(run("--no-run", "--ds-config", str(config), "--format", "json").stdout)["settings"]
    assert (settings["micro_batch_size"], settings["zero_stage"]) == (2, 2)
    more = run("--no-run", "--ds-config", str(config), "--zero-stage", "0", "--format", "json")
    assert json.loads(more.stdout)["settings"]["zero_stage"] == 0


def test_a_ds_config_that_is_no_object(tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text("[]")
    result = run("--no-run", "--ds-config", str(config))
    assert result.exit_code == 2 and "not a JSON object" in result.output


def test_activation_checkpointing_and_chunks_of_the_loss() -> None:
    result = run("--no-run", "--selective-checkpointing", "--loss-chunks", "8")
    assert "bf16, adamw, selective checkpointing, loss in 8 chunks" in result.output, result.output
    for options in (("--selective-checkpointing", "--activation-checkpointing"), ("--loss-chunks", "0")):
        result = run("--no-run", *options)
        assert result.exit_code == 2 and "cannot be estimated so" in result.output, result.output


def test_names_that_nobody_knows() -> None:
    for option, value in (("--optimizer", "adamx"), ("--dtype", "fp8"), ("--seq-length", "1000000")):
        result = run("--no-run", option, value)
        assert result.exit_code == 2 and "cannot be estimated so" in result.output, result.output


def test_sizes() -> None:
    assert size_in_bytes("80GB", "--memory") == 80 * 10**9
    assert size_in_bytes("74.5 GiB", "--memory") == int(74.5 * 2**30)
    assert size_in_bytes("1024", "--memory") == 1024
    for text in ("", "GB", "-1GB", "80 apples", "0"):
        with pytest.raises(OptionError):
            size_in_bytes(text, "--memory")


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_by_running() -> None:
    """Llama-3.1-8B: in seconds, and with what the plan alone does not say."""
    options = ("--dp-size", "4", "--zero-stage", "1", "--seq-length", "1024", "--memory", "80GB")
    result = run(*options, "--selective-checkpointing", "--loss-chunks", "16")
    assert result.exit_code == 0, result.output
    assert "optimizer states" in result.output and "all-reduce over the tensor-parallel ranks" in result.output
    assert "fits: " in result.output
