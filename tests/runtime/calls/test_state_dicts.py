"""State dicts, pickles and copies of a sharded model: right, or refused with what to call."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch


def refusal(call: Callable[[], Any]) -> str:
    """The title of the error that `call` ends in; what it proposes next must be among what this file tries."""
    from autotp_plan.schemas.errors import AutoTPError

    try:
        call()
    except AutoTPError as error:
        assert all(fault.next for fault in error.faults)
        return error.faults[0].what
    return "no error"


def every_call(work: Path) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from transformers import PreTrainedModel

    from autotp_plan.runtime import load_plan, local_shard, shards_in_state_dict
    from tests.helpers.models import batch, load_dense
    from tests.helpers.parity import engine_settings

    plan = load_plan(work / "plan.json")
    model: Any = plan.load_model(work / "model").train()
    dense = load_dense(work / "model").train()
    full = dense.state_dict()
    tokens = batch(3)
    found: dict[str, Any] = {
        "model": refusal(model.state_dict),
        "a part": refusal(model.model.layers[0].self_attn.state_dict),
        "a layer": refusal(model.lm_head.state_dict),
        "inside another module": refusal(torch.nn.ModuleList([model]).state_dict),
        "torch.save": refusal(lambda: torch.save(model, io.BytesIO())),
        "pickle": refusal(lambda: pickle.dumps(model)),
        "upload": refusal(lambda: model.push_to_hub("someone/something")),
        "push_to_hub=": refusal(lambda: model.save_pretrained(work / "no", push_to_hub=True)),
        "safe_serialization=": refusal(lambda: model.save_pretrained(work / "no", safe_serialization=False)),
        "distributed_checkpoint=": refusal(lambda: model.save_pretrained(work / "no", distributed_checkpoint=True)),
        "unknown=": refusal(lambda: model.save_pretrained(work / "no", colour="blue")),
    }
    with shards_in_state_dict():
        shards = model.state_dict()
        found["state_dict= of shards"] = refusal(lambda: model.save_pretrained(work / "no", state_dict=shards))
    found["nothing was written"] = not (work / "no").exists()
    name = "model.embed_tokens.weight"
    local = local_shard(model, name)
    assert local is not None
    found["shards in their context"] = bool(torch.equal(shards[name], local))
    # what the refusals propose
    model.save_pretrained(work / "saved")
    plan.save_shards(model, work / "saved-shards")
    # the planted error: transformers' own method writes this rank's part
    with shards_in_state_dict():
        PreTrainedModel.save_pretrained(model, work / f"planted-{dist.get_rank()}")

    def losses(of: Any) -> list[float]:
        optimizer = torch.optim.SGD(of.parameters(), lr=0.1)
        out = []
        for _ in range(3):
            loss = of(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            out.append(loss.item())
        return out

    def of_every_model(change: Callable[[], Any]) -> list[float]:
        change()
        return losses(model)

    copied = copy.deepcopy(model)
    expected = losses(load_dense(work / "model").train())
    found["deepcopy trains as the dense model"] = losses(copied) == pytest.approx(expected, rel=1e-5)
    found["the original has not moved"] = losses(model) == pytest.approx(expected, rel=1e-5)
    found["load_state_dict of full tensors"] = of_every_model(lambda: model.load_state_dict(full)) == pytest.approx(
        expected, rel=1e-5
    )
    with shards_in_state_dict():
        own = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(full)
    model.load_state_dict(own)
    before = model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
    found["load_state_dict of shards"] = before < expected[-1]

    model.load_state_dict(full)
    engine, *_ = plan.initialize(model, config=engine_settings(1))
    found["engine.module_state_dict"] = refusal(engine.module_state_dict)
    first = losses_of_engine(engine, tokens, 1)
    engine.save_checkpoint(str(work / "deepspeeds"), tag="one")
    second = losses_of_engine(engine, tokens, 2)
    engine.load_checkpoint(str(work / "deepspeeds"), tag="one")
    found["engine.save_checkpoint resumes"] = losses_of_engine(engine, tokens, 2) == second and first != second
    plan.save_checkpoint(engine, work / "job")
    return found


def losses_of_engine(engine: Any, tokens: Any, steps: int) -> list[float]:
    out = []
    for _ in range(steps):
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        out.append(loss.item())
    return out


STATE_DICT = "the state dict of a sharded model holds one rank's shards, not the model"
PICKLE = "a module that holds one rank's shards cannot be pickled"
OPTION = "a sharded model cannot be saved with this option"
EXPECTED: dict[str, Any] = {
    "model": STATE_DICT,
    "a part": STATE_DICT,
    "a layer": STATE_DICT,
    "inside another module": STATE_DICT,
    "torch.save": PICKLE,
    "pickle": PICKLE,
    "upload": "a sharded model cannot be uploaded by one call",
    "push_to_hub=": OPTION,
    "safe_serialization=": OPTION,
    "distributed_checkpoint=": OPTION,
    "unknown=": OPTION,
    "state_dict= of shards": "the state dict holds one rank's shard of a tensor",
    "nothing was written": True,
    "shards in their context": True,
    "deepcopy trains as the dense model": True,
    "the original has not moved": True,
    "load_state_dict of full tensors": True,
    "load_state_dict of shards": True,
    "engine.module_state_dict": STATE_DICT,
    "engine.save_checkpoint resumes": True,
}


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_shards_are_never_taken_for_the_model(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from autotp_plan.planner import compile_plan
    from autotp_plan.planner.shards.merge import merge
    from tests.helpers.models import load_dense, save_checkpoint

    folder = save_checkpoint(tmp_path / "model", "phi3")
    plan = compile_plan(folder, tp_size=2)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert launch(every_call, 2, tmp_path) == [EXPECTED] * 2
    whole = load_dense(folder).state_dict()
    merge(tmp_path / "saved-shards", tmp_path / "merged")
    for saved in ("saved", "merged"):
        found = load_dense(tmp_path / saved).state_dict()
        assert all(torch.equal(found[name], whole[name]) for name in whole), saved
    planted = load_file(tmp_path / "planted-0" / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert 2 * len(planted[name]) == len(whole[name]), "without the guard, half of the vocabulary is written"
    for job in ("deepspeeds", "job"):
        script = tmp_path / job / "zero_to_fp32.py"
        said = subprocess.run(
            [sys.executable, script, tmp_path / job, tmp_path / "out"], capture_output=True, text=True
        )
        assert said.returncode == 1 and "engine.module.save_pretrained(folder)" in said.stderr
        assert not (tmp_path / "out").exists()
