"""In what the section `sequence_parallel` can contradict itself and the plan: each contradiction has a name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import compile_plan
from autotp_plan.planner.sequence_parallel import with_sequence_parallel
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import DocumentError
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.checkpoints import write_llama
from tests.helpers.paths import PACKAGE

Document = dict[str, Any]
LAYER = "model.layers.{0..1}"
PLANS = sorted(path for path in (PACKAGE / "plans").rglob("tp*.json") if path.stem != "tp1")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Document:
    folder = write_llama(tmp_path_factory.mktemp("llama"))
    return compile_plan(folder, tp_size=2, sequence_parallel=True).to_dict()


def faults(document: Document) -> dict[str, tuple[str, str]]:
    """Where each fault is, and what was got, by its code."""
    rest = {key: value for key, value in document.items() if key not in ("fingerprint", "rules")}
    try:
        Plan.from_dict({**rest, "fingerprint": documents.fingerprint(rest)})
    except DocumentError as error:
        assert all(fault.next for fault in error.faults)
        return {fault.code: (fault.where, fault.got) for fault in error.faults}
    return {}


def of(document: Document, name: str) -> Document:
    (found,) = (entry for entry in document["parameters"] if entry["name"] == name)
    return found


def replace(key: str, old: str, *new: str) -> Callable[[Document], None]:
    """A change of one name in a list of the section."""

    def change(document: Document) -> None:
        listed = document["sequence_parallel"][key]
        at = listed.index(old)
        listed[at : at + 1] = new

    return change


def both(*changes: Callable[[Document], None]) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        for one in changes:
            one(document)

    return change


def end_at(name: str) -> Callable[[Document], None]:
    return lambda document: document["sequence_parallel"].update(end=name)


def without_gradient(name: str) -> Callable[[Document], None]:
    return lambda document: of(document, name).pop("partial_gradient")


def copied(document: Document) -> None:
    """The sum of o_proj goes into sharded weights again: then the plan says so of its output."""
    document["modules"] = [{"module": f"{LAYER}.self_attn.o_proj", "output": {"operation": "copy"}}]


def one_rank(document: Document) -> None:
    document["tp_size"] = 1
    for layout in document["layouts"].values():
        if "dim" in layout:
            layout["intervals"] = [[[0, layout["shape"][layout["dim"]]]]]


ATTENTION, MLP, DOWN = (f"{LAYER}.{leaf}" for leaf in ("self_attn", "mlp", "mlp.down_proj"))
O_PROJ = f"{ATTENTION}.o_proj"
PLANTED: dict[str, tuple[Callable[[Document], None], dict[str, str]]] = {
    "braces": (replace("gather", MLP, "model.layers.{1..0}.mlp"), {"bad-name-pattern": ""}),
    "a module that is none": (
        replace("gather", MLP, f"{LAYER}.mpl"), {"stream-unknown-module": "sequence_parallel.gather"}
    ),
    "a parameter": (
        replace("scatter", O_PROJ, f"{O_PROJ}.weight"), {"stream-unknown-module": "sequence_parallel.scatter"}
    ),
    "a layer too many": (
        replace("layers", LAYER, "model.layers.{0..2}"), {"stream-unknown-module": "sequence_parallel.layers"}
    ),
    "an end that is none": (end_at("model.nrom"), {"stream-unknown-module": "sequence_parallel.end"}),
    "an end in a layer": (end_at("model.layers.1.mlp"), {"stream-end": "sequence_parallel.end"}),
    "an end before the last layer": (end_at("model.layers.0"), {"stream-end": "sequence_parallel.end"}),
    "several ends": (end_at("model.layers.{0..1}"), {"stream-end": "sequence_parallel.end"}),
    "an end with braces": (end_at("model.layers.{1..1}"), {"stream-end": "sequence_parallel.end"}),
    "a module twice": (replace("gather", MLP, MLP, MLP), {"stream-place-twice": "sequence_parallel.gather"}),
    "a module in another": (
        replace("gather", MLP, MLP, f"{LAYER}.mlp.up_proj"), {"stream-place-twice": "sequence_parallel.gather"}
    ),
    "layers backwards": (
        replace("layers", LAYER, "model.layers.1", "model.layers.0"), {"stream-order": "sequence_parallel.layers"}
    ),
    "a gather outside": (
        replace("gather", MLP, MLP, "lm_head"), {"stream-place-outside": "sequence_parallel.gather"}
    ),
    "a gather without a scatter": (
        replace("scatter", O_PROJ), {"stream-gather-alone": "sequence_parallel.gather", "stream-sum-not-scattered": ""}
    ),
    "a copied sum is not scattered, and then nothing is": (
        both(copied, replace("scatter", O_PROJ)),
        {"stream-gather-alone": "sequence_parallel.gather"},
    ),
    "a scatter without a gather": (
        both(replace("gather", MLP), replace("scatter", DOWN, MLP)),
        {"stream-scatter-alone": "sequence_parallel.scatter", "stream-weight-not-gathered": ""},
    ),
    "one layer's module is not gathered": (
        replace("gather", ATTENTION, "model.layers.0.self_attn"), {"stream-weight-not-gathered": ""}
    ),
    "one layer's sum is not scattered": (
        replace("scatter", DOWN, "model.layers.0.mlp.down_proj"),
        {"stream-sum-not-scattered": "", "stream-gather-alone": ""},
    ),
    "a norm's gradient": (without_gradient(f"{LAYER}.input_layernorm.weight"), {"stream-gradient": ""}),
    "the last norm's gradient": (without_gradient("model.norm.weight"), {"stream-gradient": ""}),
    "one rank": (one_rank, {"stream-of-one-rank": "sequence_parallel"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_each_contradiction_is_told(sound: Document, name: str) -> None:
    change, expected = PLANTED[name]
    document = copy.deepcopy(sound)
    change(document)
    found = faults(document)
    assert found.keys() == expected.keys(), found
    assert all(found[code][0].startswith(where) for code, where in expected.items())


def test_a_sound_one_has_none(sound: Document) -> None:
    assert faults(sound) == {}
    column_layers = copy.deepcopy(sound)
    columns = [f"{LAYER}.mlp.{leaf}_proj" for leaf in ("gate", "up")]
    replace("gather", MLP, *columns)(column_layers)
    assert faults(column_layers) == {}
    whole_module = copy.deepcopy(sound)
    replace("scatter", DOWN, MLP)(whole_module)
    assert faults(whole_module) == {}
    ends_with_layers = copy.deepcopy(sound)
    end_at("model.layers.1")(ends_with_layers)
    assert faults(ends_with_layers) == {}


def test_a_wrong_name_is_told_what_it_may_be(sound: Document) -> None:
    document = copy.deepcopy(sound)
    replace("gather", MLP, f"{LAYER}.mpl")(document)
    rest = {key: value for key, value in document.items() if key not in ("fingerprint", "rules")}
    with pytest.raises(DocumentError, match="did you mean"):
        Plan.from_dict({**rest, "fingerprint": documents.fingerprint(rest)})


def test_a_bias_that_is_added_to_the_scattered_sum(sound: Document) -> None:
    document = copy.deepcopy(sound)
    norm = of(document, f"{LAYER}.input_layernorm.weight")
    document["parameters"].append({**norm, "name": f"{O_PROJ}.bias"})
    assert faults(document) == {}
    without_gradient(f"{O_PROJ}.bias")(document)
    assert faults(document) == {"stream-gradient": (f"parameters[{len(document['parameters']) - 1}]", f"{O_PROJ}.bias")}


@pytest.mark.parametrize("path", PLANS[::4], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_is_found_for_any_model_is_sound(path: Path) -> None:
    assert faults(with_sequence_parallel(Plan.read(path)).to_dict()) == {}


def test_the_schema_knows_the_section(sound: Document) -> None:
    assert json.loads((PACKAGE / "schemas" / "plan.schema.json").read_text())["properties"]["sequence_parallel"]
    for key in ("layers", "gather", "scatter", "end"):
        document = copy.deepcopy(sound)
        del document["sequence_parallel"][key]
        assert faults(document).keys() == {"missing-key"}
