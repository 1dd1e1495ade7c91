"""What a refused call says to do instead is done, on the same model, and gives what the dense model gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch


def refused(call: Callable[[], Any]) -> str:
    """The next step that the error of a refused call names."""
    from autotp_plan.schemas.errors import AutoTPError

    with pytest.raises(AutoTPError) as caught:
        call()
    return caught.value.faults[0].next


def loss_of(model: Any) -> float:
    import torch

    from tests.helpers.models import batch

    model.eval()
    with torch.no_grad():
        found: float = model(input_ids=batch(5), labels=batch(5)).loss.item()
    return found


def tokens_of(model: Any) -> list[list[int]]:
    import torch

    prompt = torch.tensor([[7, 8, 9], [3, 4, 5]])
    found: list[list[int]] = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False
    ).tolist()
    return found


def in_two_ranks(work: Path) -> dict[str, Any]:
    import deepspeed
    import torch
    from peft import LoraConfig

    from autotp_plan.runtime import load_plan, shards_in_state_dict
    from tests.helpers.models import batch
    from tests.helpers.parity import engine_settings

    plan = load_plan(work / "plan.json")
    model: Any = plan.load_model(work / "model")
    first = plan.ranks.tp_rank == 0
    found: dict[str, Any] = {}

    assert "huggingface_hub.upload_folder" in refused(lambda: model.push_to_hub("someone/model"))
    assert "huggingface_hub.upload_folder" in refused(lambda: model.save_pretrained(work / "x", push_to_hub=True))
    assert "plan.save_checkpoint" in refused(lambda: model.save_pretrained(work / "x", distributed_checkpoint=True))
    assert refused(lambda: model.save_pretrained(work / "x", safe_serialization=False)) == "leave it out"
    if first:
        assert refused(lambda: model.save_pretrained(work / "x", is_main_process=False)) == "leave it out"
    with shards_in_state_dict():
        shards = model.state_dict()
    assert "leave out state_dict" in refused(lambda: model.save_pretrained(work / "x", state_dict=shards))
    model.save_pretrained(work / "uploaded", is_main_process=first)

    assert 'set_attn_implementation("sdpa")' in refused(lambda: model.set_use_kernels(True))
    model.set_attn_implementation("sdpa")
    found["sdpa"] = loss_of(model)
    assert "model.generate" in refused(lambda: model.generate_batch([[1, 2]]))
    assert "model.eval() and model.generate" in refused(lambda: deepspeed.init_inference(model, dtype=torch.float32))
    found["generate"] = tokens_of(model.eval())
    assert "plan.load_model(path) alone" in refused(lambda: model.maybe_distribute_model(model, None, object()))

    before = [one.requires_grad for one in model.parameters()]
    hint = refused(lambda: plan.add_lora(model, LoraConfig(target_modules=["q_proj", "embed_tokens"])))
    assert "leave the module out of target_modules" in hint
    assert [one.requires_grad for one in model.parameters()] == before, "a refused adapter froze the model"
    found["after a refused adapter"] = loss_of(model)
    adapted = plan.add_lora(model, LoraConfig(target_modules=["q_proj"]))
    found["adapter"] = loss_of(adapted)
    two = LoraConfig(target_modules=["k_proj", "embed_tokens"])
    assert "leave the module out" in refused(lambda: adapted.add_adapter("second", two))
    adapted.set_adapter("default")
    found["after a refused second adapter"] = loss_of(adapted)
    assert "save_pretrained" in refused(lambda: adapted.save_pretrained(str(work / "x")))
    assert "plan.save_adapter" in refused(lambda: model.save_pretrained(work / "x"))
    plan.save_adapter(plan.initialize(adapted, config=engine_settings(1))[0], work / "adapter")

    engine, *_ = plan.initialize(plan.load_model(work / "model").train(), config=engine_settings(2))
    engine.backward(engine(input_ids=batch(0), labels=batch(0)).loss)
    engine.step()
    engine.save_checkpoint(str(work / "job"), tag="one")
    found["trained"] = loss_of(engine)
    other, *_ = plan.initialize(plan.load_model(work / "model").train(), config=engine_settings(2))
    other.load_checkpoint(str(work / "job"))  # as the script says that DeepSpeed's script is replaced by
    other.module.save_pretrained(work / "recovered")
    return found


def in_the_resized(work: Path) -> float:
    from autotp_plan.runtime import load_plan

    return loss_of(load_plan(work / "resized.json").load_model(work / "resized"))


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_what_a_refusal_says_works(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import load_dense, save_checkpoint

    save_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "plan.json").write_text(compile_plan(tmp_path / "model", tp_size=2).to_json())
    dense: Any = load_dense(tmp_path / "model")
    loss, tokens = loss_of(dense), tokens_of(dense)
    dense.resize_token_embeddings(264)  # as the refusal says, before compile
    dense.save_pretrained(tmp_path / "resized")
    (tmp_path / "resized.json").write_text(compile_plan(tmp_path / "resized", tp_size=2).to_json())
    for found in launch(in_two_ranks, 2, tmp_path):
        for name in ("sdpa", "after a refused adapter", "adapter", "after a refused second adapter"):
            assert found[name] == pytest.approx(loss, rel=1e-5), name
        assert found["generate"] == tokens
        assert loss_of(load_dense(tmp_path / "recovered")) == pytest.approx(found["trained"], rel=1e-5)
    assert loss_of(load_dense(tmp_path / "uploaded")) == loss
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    script = subprocess.run(
        [sys.executable, tmp_path / "job" / "zero_to_fp32.py", "job", "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert script.returncode == 1 and "engine.module.save_pretrained(folder) on every rank" in script.stderr
    for resized in launch(in_the_resized, 2, tmp_path):
        assert resized == pytest.approx(loss_of(dense), rel=1e-5)
