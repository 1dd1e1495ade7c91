"""A call that needs all ranks, made on some of them, ends in an error that names the others; all may repeat it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

Found = dict[str, tuple[str, float]]
"""By case, what a call ended in, and after how many seconds."""


def calls_of(plan: Any, engine: Any, trainer: Any, fresh: Any, work: Path) -> dict[str, Callable[[], Any]]:
    import torch

    prompt = torch.tensor([[5, 6, 7]])
    model = engine.module
    return {
        "model.save_pretrained": lambda: model.save_pretrained(work / "pretrained"),
        "plan.save_shards": lambda: plan.save_shards(engine, work / "shards"),
        "engine.save_16bit_model": lambda: engine.save_16bit_model(str(work)),
        "engine.save_checkpoint": lambda: engine.save_checkpoint(str(work / "engine")),
        "engine.load_checkpoint": lambda: engine.load_checkpoint(str(work / "engine")),
        "plan.save_checkpoint": lambda: plan.save_checkpoint(engine, work / "job"),
        "plan.load_checkpoint": lambda: plan.load_checkpoint(engine, work / "job"),
        "model.generate": lambda: model.generate(prompt, max_new_tokens=2),
        "model.forward": lambda: fresh(input_ids=prompt),
        "trainer.save_model": lambda: trainer.save_model(str(work / "trainer")),
        "trainer.evaluate": trainer.evaluate,
        "trainer.predict": lambda: trainer.predict(trainer.eval_dataset),
        "trainer.get_eval_dataloader": trainer.get_eval_dataloader,
    }


def end_of(call: Callable[[], Any]) -> tuple[str, float]:
    from autotp_plan.schemas.errors import MismatchError

    begin = time.monotonic()
    try:
        call()
    except MismatchError as error:
        return str(error), time.monotonic() - begin
    return "done", time.monotonic() - begin


def alone(work: Path) -> Found:
    """Four ranks, two of them TP ranks: each call on some ranks, then on all of them."""
    import torch.distributed as dist

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.deepspeed import attendance
    from autotp_plan.schemas.upstream import replaced
    from tests.helpers.parity import engine_settings
    from tests.runtime.calls.trainer_calls import make_trainer

    plan = load_plan(work / "plan.json")
    trainer = make_trainer(plan.load_model(work / "model"), work)
    plan.adapt_trainer(trainer)
    trainer.train()
    model = plan.load_model(work / "model")
    engine, *_ = plan.initialize(model, config=engine_settings(1))
    here = dist.get_rank()
    found: Found = {}

    def case(name: str, call: Callable[[], Any], ranks: tuple[int, ...]) -> None:
        if here in ranks:
            found[name] = end_of(call)
        dist.barrier()

    calls = calls_of(plan, engine, trainer, plan.load_model(work / "model"), work)
    with replaced(attendance, "SECONDS", 0.3):
        for name, call in calls.items():
            case(name, call, (0,))
    with replaced(attendance, "SECONDS", 3.0), replaced(attendance, "SECONDS_FOR_FIRST", 4.0):
        case("not the first", calls["plan.save_shards"], (1, 2, 3))
        both = {0: calls["model.save_pretrained"], 1: calls["plan.save_shards"]}
        case("another call", lambda: both[here % 2](), (0, 1, 2, 3))
    case("one TP group", calls["model.generate"], (0, 1))
    for name, call in calls.items():
        case(f"{name} of all", call, (0, 1, 2, 3))
    return found


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_a_call_on_some_ranks_names_the_others(tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    save_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "plan.json").write_text(compile_plan(tmp_path / "model", tp_size=2).to_json())
    ranks = launch(alone, 4, tmp_path)
    single = [name for name in ranks[0] if f"{name} of all" in ranks[0]]
    assert len(single) == 13
    for name in single:
        text, seconds = ranks[0][name]
        absent = "rank 1 did not" if name in ("model.generate", "model.forward") else "ranks 1, 2, 3 did not"
        assert name in text and f"rank 0 called it; {absent}" in text and "on every rank" in text, (name, text)
        assert seconds < 20, name
        for rank in ranks:
            assert rank[f"{name} of all"][0] == "done", (name, rank[f"{name} of all"])
    for rank in ranks[1:]:
        text, seconds = rank["not the first"]
        assert "ranks 1, 2, 3 called it; rank 0 did not" in text
        assert seconds > 3.9, "the first rank has more time"
    assert ranks[0]["one TP group"][0] == ranks[1]["one TP group"][0] == "done"
    texts = [rank["another call"][0] for rank in ranks]
    assert all("not every rank makes a call" in text for text in texts)
    assert any("called plan.save_shards" in text or "called model.save_pretrained" in text for text in texts)
