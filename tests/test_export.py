"""Plans in the words of plain DeepSpeed: right where they can be said, refused where they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotp_plan.planner import compile_plan
from autotp_plan.planner.cli import main
from autotp_plan.planner.deepspeed_config import parse_section
from autotp_plan.planner.export import export_to_deepspeed
from tests.helpers.launch import launch

EXPRESSIBLE = ("llama", "llama_bias_tied", "mistral", "qwen2", "gemma", "granite", "starcoder2", "glm", "gpt_neox")
TRAINED = ("llama", "qwen2", "glm", "gpt_neox")
OBSTACLES = {
    "qwen3": "does not sum it",
    "phi3": "must be local",
    "mixtral": "fused experts",
    "bloom": "ALiBi",
    "olmo2": "means",
    "gpt2": "Conv1D",
    "deepseek_v2": "cut neighbours",
    "gpt_oss": "added to a sum",
    "falcon_multi_query": "several ranks share it",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.helpers.models import save_checkpoint

    folder = tmp_path_factory.mktemp("export")
    return {variant: save_checkpoint(folder / variant, variant) for variant in (*EXPRESSIBLE, *OBSTACLES)}


@pytest.mark.parametrize("variant", EXPRESSIBLE)
def test_there_and_back(checkpoints: dict[str, Path], variant: str) -> None:
    plan = compile_plan(checkpoints[variant], tp_size=2)
    exported = export_to_deepspeed(plan)
    assert not exported.obstacles
    assert any("embed" in name or "lm_head" in name for name in exported.whole)
    section = parse_section({"autotp_size": 2, "partition_config": exported.partition_config})
    again = compile_plan(checkpoints[variant], deepspeed=section)
    assert [(p.name, again.layouts[p.layout], p.style) for p in again.expanded()] == [
        (p.name, plan.layouts[p.layout], p.style) for p in plan.expanded()
    ]


@pytest.mark.parametrize("variant", list(OBSTACLES))
def test_what_cannot_be_said(checkpoints: dict[str, Path], tmp_path: Path, variant: str) -> None:
    plan = compile_plan(checkpoints[variant], tp_size=2)
    assert any(OBSTACLES[variant] in obstacle.reason for obstacle in export_to_deepspeed(plan).obstacles)
    (tmp_path / "plan.json").write_text(plan.to_json())
    output = tmp_path / "config.json"
    done = CliRunner().invoke(main, ["export", str(tmp_path / "plan.json"), "--to", "deepspeed", "-o", str(output)])
    assert done.exit_code == 1 and not output.exists()
    assert OBSTACLES[variant] in done.stderr


def test_uneven_shares_cannot_be_said(tmp_path: Path) -> None:
    from tests.helpers.models import save_checkpoint

    plan = compile_plan(save_checkpoint(tmp_path / "llama", "llama"), tp_size=3, uneven=True)
    assert any("unequal size" in obstacle.reason for obstacle in export_to_deepspeed(plan).obstacles)


def test_presets_are_listed_and_shown() -> None:
    listed = json.loads(CliRunner().invoke(main, ["presets", "list", "--format", "json"]).stdout)
    names = [one["name"] for one in listed]
    assert {"llama", "mixtral", "deepseek_v3", "falcon"} <= set(names) and names == sorted(names)
    table = CliRunner().invoke(main, ["presets", "list"]).stdout
    assert all(name in table for name in names)
    assert json.loads(CliRunner().invoke(main, ["presets", "show", "llama"]).stdout)["name"] == "llama"
    wrong = CliRunner().invoke(main, ["presets", "show", "lama"])
    assert wrong.exit_code == 2 and 'did you mean "llama"?' in wrong.stderr


def plain_deepspeed(work: Path) -> dict[str, Any]:
    """Inside a rank: losses of plain DeepSpeed AutoTP with the exported config."""
    import deepspeed

    from tests.helpers import parity
    from tests.helpers.models import batch, load_dense

    found: dict[str, Any] = {}
    deepspeed.init_distributed(dist_backend="gloo")
    for variant in TRAINED:
        model = load_dense(work / variant, tie_word_embeddings=False)
        whole = sum(parameter.numel() for parameter in model.parameters())
        section = json.loads((work / f"{variant}.json").read_text())
        settings = {**parity.engine_settings(1), **section}
        engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=list(model.parameters()))
        history = []
        for step in range(3):
            loss, _ = parity.causal_lm(engine, batch(1000 * step))
            engine.backward(loss)
            engine.step()
            history.append((loss.item(), float(engine.get_global_grad_norm())))
        held = sum(parameter.numel() for parameter in engine.module.parameters())
        found[variant] = history, held / whole
    return found


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_plain_deepspeed_trains_by_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from tests.helpers import parity
    from tests.helpers.models import load_dense, save_checkpoint

    dense = {}
    for variant in TRAINED:
        changes = {"tie_word_embeddings": False}
        save_checkpoint(tmp_path / variant, variant, **changes)
        plan = compile_plan(tmp_path / variant, tp_size=2)
        (tmp_path / "plan.json").write_text(plan.to_json())
        arguments = [
            "export",
            str(tmp_path / "plan.json"),
            "--to",
            "deepspeed",
            "-o",
            str(tmp_path / f"{variant}.json"),
        ]
        assert CliRunner().invoke(main, arguments).exit_code == 0
        dense[variant] = parity.dense_steps(load_dense(tmp_path / variant), 1)[:3]
    for found in launch(plain_deepspeed, 2, tmp_path, timeout=150):
        for variant, (history, share) in found.items():
            assert share < 0.75, f"{variant}: DeepSpeed left it whole"
            for (loss, _), (expected, _) in zip(history, dense[variant], strict=True):
                assert loss == pytest.approx(expected, rel=1e-4), variant
