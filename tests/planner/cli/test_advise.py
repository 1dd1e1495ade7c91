"""`autotp-plan advise`: what it prints, its exit status, and what it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autotp_plan.planner.cli.main import main
from autotp_plan.planner.estimate.hardware import FILE
from tests.helpers.checkpoints import write_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("advise") / "llama", num_hidden_layers=12, max_position_embeddings=512)


def run(llama: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["advise", "--model", str(llama), "--reserve", "0", *arguments])


def test_of_the_plans_alone(llama: Path) -> None:
    result = run(llama, "--gpus", "8", "--gpu-memory", "400kB", "--no-run")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM on 8 GPUs in 1 node, 390.62 KiB of each: 64 x 512 tokens a step" in result.output
    assert "not in it: activations" in result.output and "do not fit" not in result.output
    assert "autotp-plan compile --model" in result.output


def test_sizes_that_cannot_be_planned_and_uneven_ones(llama: Path) -> None:
    result = run(llama, "--gpus", "12", "--gpus-per-node", "4", "--gpu-memory", "1MB", "--no-run", "--format", "json")
    document = json.loads(result.stdout)
    assert {way["tp_size"] for way in document["fits"]} == {1, 2, 3, 4}
    assert sorted(document["not_planned"], key=int) == ["6", "12"]
    assert "KV heads" in document["not_planned"]["6"]
    few = run(
        llama, "--gpus", "12", "--gpus-per-node", "4", "--gpu-memory", "1MB", "--no-run", "--global-batch-size", "4"
    )
    assert "no plan at TP=2: 4 sequences of a step are no multiple of DP=6" in few.output
    assert " --tp 3 --uneven -o plan.json" in few.output


def test_the_commands_that_are_printed_work(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(run(llama, "--gpus", "8", "--gpu-memory", "200kB", "--no-run", "--format", "json").stdout)
    monkeypatch.chdir(tmp_path)
    for command in document["commands"]:
        further = ["--no-run"] if " estimate " in command else []
        result = CliRunner().invoke(main, [*shlex.split(command)[1:], *further])
        assert result.exit_code == 0, result.output
    (tmp_path / "ds.json").write_text(json.dumps(document["ds_config"]))
    result = CliRunner().invoke(
        main, ["estimate", "plan.json", "--no-run", "--ds-config", "ds.json", "--dp-size", "8", "--format", "json"]
    )
    (rank,) = json.loads(result.stdout)["ranks"]
    assert rank["peak"] == document["fits"][0]["peak"], "the config trains as was advised"


def test_what_would_fit(llama: Path) -> None:
    """Each of them is tried: with as many GPUs it fits."""
    result = run(llama, "--gpus", "8", "--gpu-memory", "60kB", "--no-run", "--format", "json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert not document["fits"] and document["too_large"][0]["margin"] < 0
    would = {one["what"]: one for one in document["would_fit"]}
    assert would.keys() == {"gpus", "offload"}
    more = str(would["gpus"]["number"])
    assert run(llama, "--gpus", more, "--gpu-memory", "60kB", "--no-run").exit_code == 0
    assert run(llama, "--gpus", str(int(more) - 8), "--gpu-memory", "60kB", "--no-run").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hardware", "b100"], "h100, a100, or a file"),
        (["--seq-length", "513"], "at most 512"),
        (["--gpus", "12"], "12 GPUs, 8 in a node"),
        (["--gpu-memory", "80xB"], "not a size"),
        (["--reserve", "2MB"], "leaves no memory"),
        (["--global-batch-size", "0"], "has no sequences"),
        (["--gpus", "11", "--gpus-per-node", "11", "--global-batch-size", "7"], "TP=11|heads|11"),
    ],
)
def test_what_is_refused(llama: Path, arguments: list[str], said: str) -> None:
    result = run(llama, "--gpus", "8", "--gpu-memory", "1MB", "--no-run", *arguments)
    assert result.exit_code == 2, result.output
    assert any(one in result.output for one in said.split("|")), result.output


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_what_is_advised_is_what_estimate_says(llama: Path, tmp_path: Path) -> None:
    """On a memory that some ways fit: the chosen one, estimated by the printed command, takes what was said."""
    hardware = tmp_path / "slow.json"
    hardware.write_text(json.dumps({"slow": {**json.loads(FILE.read_text())["h100"], "operations_per_s": 1e12}}))
    options = ["--gpus", "2", "--gpu-memory", "1.1GB", "--global-batch-size", "4", "--hardware", str(hardware)]
    result = run(llama, *options, "--format", "json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    chosen = document["chosen"]
    assert len(chosen) == 3
    seconds = [way["seconds"]["total"] for way in chosen]
    assert seconds == [way["seconds"]["total"] for way in document["fits"][:3]] == sorted(seconds)
    compiles, estimates = document["commands"]
    plan = str(tmp_path / "plan.json")
    assert CliRunner().invoke(main, [*shlex.split(compiles)[1:-1], plan]).exit_code == 0
    given = shlex.split(estimates)[2:]
    again = CliRunner().invoke(main, ["estimate", plan, *given[1:], "--format", "json"])
    assert again.exit_code == 0, again.output
    (rank,) = json.loads(again.stdout)["ranks"]
    assert rank["peak"] == chosen[0]["peak"]
    assert rank == chosen[0]["estimate"]["ranks"][0]
