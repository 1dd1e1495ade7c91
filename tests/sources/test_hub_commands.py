"""The commands and a training job, given an id of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotp_plan.planner.cli.main import main
from tests.helpers.checkpoints import write_llama
from tests.helpers.hub_client import loopback_hub, point_to
from tests.helpers.hub_server import HubServer, Repository, folder_files
from tests.helpers.launch import launch


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with loopback_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


def test_the_commands(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["org/llama"] = Repository(folder_files(write_llama(tmp_path / "llama")))
    plan, shards = str(tmp_path / "plan.json"), str(tmp_path / "shards")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    run("compile", "--model", "org/llama", "--tp", "2", "-o", plan)
    assert f"compiled from hf://org/llama@{'c' * 40}" in run("show", plan)
    assert "org/llama holds what it says" in run("check", plan, "--checkpoint", "org/llama")
    run("presplit", plan, "--checkpoint", "hf://org/llama@main", "-o", shards)
    run("check", shards)
    assert "every byte is that of org/llama" in run("check", shards, "--checkpoint", "org/llama")
    result = CliRunner().invoke(main, ["compile", "--model", "org/lama", "--tp", "2", "-o", plan])
    assert result.exit_code == 2
    assert "no such folder, and no such repository" in result.output


def load_and_save(url: str, cache: Path, place: str, plan_file: str, output: str) -> dict[str, Any]:
    """A rank's logits of the model in a place, the shards it saves, and its tokenizer's name for a token."""
    import torch
    from transformers import AutoTokenizer

    from autotp_plan.runtime import load_plan
    from autotp_plan.sources.model_folder import model_folder

    point_to(url, cache, pytest.MonkeyPatch())
    plan = load_plan(plan_file)
    model = plan.load_model(place, dtype=torch.float64).eval()
    plan.save_shards(model, output)
    found = model_folder(place)
    found.complete()
    return {
        "logits": model(torch.arange(8)[None]).logits.detach(),
        "token": AutoTokenizer.from_pretrained(str(found.folder)).convert_ids_to_tokens(0),
    }


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_a_job_loads_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    """The logits of the dense model; and the shards that the job saves hold the small files of the repository."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=64,
    )  # fmt: skip
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    dense.save_pretrained(folder, max_shard_size="100KB")
    tokenizer = Tokenizer(models.BPE({f"<{number}>": number for number in range(64)}, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    hub.repositories["org/llama"] = Repository(folder_files(folder))
    plan = str(tmp_path / "plan.json")
    assert CliRunner().invoke(main, ["compile", "--model", "org/llama", "--tp", "2", "-o", plan]).exit_code == 0
    expected = dense(torch.arange(8)[None]).logits
    for found in launch(load_and_save, 2, hub.url, tmp_path / "cache", "org/llama", plan, str(tmp_path / "saved")):
        assert torch.allclose(found["logits"], expected, rtol=0, atol=1e-12)
        assert found["token"] == "<0>"
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
