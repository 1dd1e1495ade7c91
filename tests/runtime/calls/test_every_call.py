"""Every method of PreTrainedModel, DeepSpeedEngine and Trainer does on a sharded model what docs/calls.md says.

What the page calls right gives what the model without sharding gives, and its numbers afterwards; what it calls refused
raises one of our errors, and changes nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.calls_page import NO_WEIGHTS, PART, REFUSED, RIGHT, group_of, rows
from tests.helpers.launch import launch
from tests.helpers.models import load_dense, save_checkpoint

HERE = "runtime/calls/test_every_call.py"
SECTIONS = {
    "PreTrainedModel": "model_calls", "GenerationMixin": "model_calls", "nn.Module": "model_calls",
    "DeepSpeedEngine": "engine_calls", "deepspeed.utils": "engine_calls", "Trainer": "trainer_calls",
}  # fmt: skip
TOGETHER = "after all that share an object"
LOW_PRECISION = ("half", "bfloat16")

Found = dict[str, dict[str, tuple[Any, Any]]]
"""By section and call: what it gives or raises, and the numbers afterwards."""


def module_of(section: str) -> Any:
    return importlib.import_module(f"tests.runtime.calls.{SECTIONS[section]}")


def calls_of(section: str) -> dict[str, Callable[[Any, Path], Any]]:
    found: dict[str, Callable[[Any, Path], Any]] = module_of(section).CALLS[section]
    return found


def names_of(key: str) -> list[str]:
    """The methods that a key of a table is about: `save + load: how`."""
    return key.partition(":")[0].split(" + ")


def answers(make: Callable[[str, str, Path], Any], folder: Path) -> Found:
    """The answers of all calls, each of an object of its own but for those that may share one."""
    found: Found = {}
    for section in SECTIONS:
        found[section], shared = {}, None
        module = module_of(section)
        for number, (name, call) in enumerate(calls_of(section).items()):
            place = folder / f"{section}-{number}"
            place.mkdir(parents=True, exist_ok=True)
            if name in module.TOGETHER:
                shared = make(section, name, place) if shared is None else shared
                found[section][name] = said(call, shared, place), None
            else:
                subject = make(section, name, place)
                found[section][name] = said(call, subject, place), said(module.numbers, subject)
        if shared is not None:
            found[section][TOGETHER] = None, said(module.numbers, shared)
    return found


def said(call: Callable[..., Any], subject: Any, *place: Path) -> Any:
    """What a call gives; its error in words, without the name of the folder."""
    from autotp_plan.schemas.errors import AutoTPError

    try:
        return call(subject, *place)
    except Exception as error:
        text = f"{'refused' if isinstance(error, AutoTPError) else 'raised'} {type(error).__name__}: {error}"
        for folder in place:
            text = text.replace(str(folder), "folder")
        return text


def sharded(work: Path) -> Found:
    """Inside a rank."""
    from autotp_plan.runtime import load_plan

    plan = load_plan(work / "plan.json")

    def make(section: str, name: str, place: Path) -> Any:
        model = plan.load_model(work / "llama").train()
        if SECTIONS[section] == "engine_calls":
            return plan.initialize(model, config=module_of(section).config_of(name))[0]
        if section == "Trainer":
            trainer = module_of(section).make_trainer(model, place)
            plan.adapt_trainer(trainer)
            return trainer
        return model

    return answers(make, work / "sharded")


def dense(work: Path) -> Found:
    """Inside the only rank of another job."""
    import deepspeed

    def make(section: str, name: str, place: Path) -> Any:
        model = load_dense(work / "llama")
        if SECTIONS[section] == "engine_calls":
            return deepspeed.initialize(model=model, config=module_of(section).config_of(name))[0]
        return module_of(section).make_trainer(model, place) if section == "Trainer" else model

    return answers(make, work / "dense")


def close(value: Any, expected: Any, rel: float) -> bool:
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(close(one, expected[key], rel) for key, one in value.items())
    if isinstance(value, (list, tuple)) and isinstance(expected, (list, tuple)):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(close(one, other, rel) for one, other in pairs)
    if isinstance(value, float) and isinstance(expected, float):
        return value == pytest.approx(expected, rel=rel, abs=rel if rel > 1e-3 else rel / 100)
    return bool(value == expected)


def problems(group: str, answer: tuple[Any, Any], expected: tuple[Any, Any], rel: float) -> list[str]:
    """What is not as docs/calls.md says."""
    (value, after), (dense_value, dense_after) = answer, expected
    refused = isinstance(value, str) and value.startswith("refused ")
    raised = isinstance(value, str) and value.startswith("raised ")
    found = []
    if group == REFUSED:
        if not refused:
            found.append(f"is not refused, but gives {value}")
        return found
    if refused:
        found.append(f"is refused: {value}")
    elif raised and value != dense_value:
        found.append(f"{value}; dense: {dense_value}")
    elif group in RIGHT and not close(value, dense_value, rel):
        found.append(f"gives {value}; dense: {dense_value}")
    if not close(after, dense_after, rel):
        found.append(f"numbers afterwards: {after}; dense: {dense_after}")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, list[Found]]:
    from autotp_plan.planner import compile_plan

    work = tmp_path_factory.mktemp("calls")
    save_checkpoint(work / "llama", "llama")
    (work / "plan.json").write_text(compile_plan(work / "llama", tp_size=2).to_json())
    (one,) = launch(dense, 1, work)
    return one, launch(sharded, 2, work)


pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_call_does_what_the_page_says(found: tuple[Found, list[Found]], section: str) -> None:
    one, ranks = found
    groups = group_of(section)
    wrong = []
    for name, expected in one[section].items():
        rel = 1e-2 if name in LOW_PRECISION else 1e-5
        group = RIGHT[0] if name == TOGETHER else groups[names_of(name)[0]]
        for rank, answer in enumerate(ranks):
            wrong += [f"rank {rank}, {name}: {text}" for text in problems(group, answer[section][name], expected, rel)]
    assert not wrong, "\n".join(wrong)


def test_planted_differences_are_found(found: tuple[Found, list[Found]]) -> None:
    right = (1.0, [2.0])
    assert not problems(RIGHT[0], right, right, 1e-5)
    assert problems(RIGHT[0], (1.1, [2.0]), right, 1e-5)
    assert problems(RIGHT[0], (1.0, [2.1]), right, 1e-5) and problems(PART, (1.0, [2.1]), right, 1e-5)
    assert problems(RIGHT[1], ("raised KeyError: 1", [2.0]), right, 1e-5)
    assert problems(PART, ("raised KeyError: 1", [2.0]), right, 1e-5)
    assert problems(REFUSED, right, right, 1e-5)
    assert problems(RIGHT[0], ("refused MismatchError: no", [2.0]), right, 1e-5)
    one, (first, _) = found  # transformers' own method counts one rank's parameters
    assert problems(RIGHT[1], first["PreTrainedModel"]["get_memory_footprint"],
                    one["PreTrainedModel"]["get_memory_footprint"], 1e-5)  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_every_row_that_names_this_test_is_called_here(section: str) -> None:
    called = {name for key in calls_of(section) for name in names_of(key)}
    named = {
        call
        for row in rows()
        if row.section == section and any(test.startswith(HERE) for test in row.tests)
        for call in row.calls
    }
    assert not named - called, "not called"
    assert not {name for name in called if group_of(section).get(name) is None}, "not listed"
    assert NO_WEIGHTS not in {group_of(section)[call] for call in named}
