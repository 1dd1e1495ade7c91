"""Documents that are small and made to take without end: answered, or refused in a sentence, within seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import SpecFile, check_checkpoint, check_plan, compile_plan
from autotp_plan.planner.plan_table import rows
from autotp_plan.planner.rules import matching
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import AutoTPError
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.checkpoints import LLAMA_CONFIG, write_checkpoint, write_llama

MILLION = "{0..999999}"
SECONDS = 10.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < SECONDS


def sealed(data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    rest = {key: value for key, value in {**data, **changes}.items() if key not in ("fingerprint", "verified", "rules")}
    return {**rest, "fingerprint": documents.fingerprint(rest)}


def refused(data: dict[str, Any], code: str) -> None:
    with pytest.raises(AutoTPError) as caught:
        Plan.from_dict(data)
    assert code in {fault.code for fault in caught.value.faults}
    assert len(caught.value.faults) <= documents.MOST_FAULTS + 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("key", "entries"),
    [
        ("ignored", [f"x{i}.{MILLION}.w" for i in range(20)]),
        ("module_attributes", [{"module": f"m{i}.{MILLION}", "attribute": "a", "values": [1, 1]} for i in range(200)]),
        ("modules", [{"module": f"m{i}.{MILLION}", "buffers": {"b": "w"}} for i in range(100)]),
        (
            "sequence_parallel",
            {"layers": [f"m{i}.{MILLION}" for i in range(99)], "gather": ["x"], "scatter": ["x"], "end": "x"},
        ),
    ],
)
def test_lists_of_a_million_names_each(llama: Path, key: str, entries: Any) -> None:
    refused(sealed(compile_plan(llama, tp_size=2).to_dict(), **{key: entries}), "too-many-names")


@pytest.mark.timeout(120)
def test_a_sharded_stream_of_many_long_names(llama: Path) -> None:
    """Every layer is in the section, and in the parameters; the names are as long as names may be."""
    plan = compile_plan(llama, tp_size=2, sequence_parallel=True).to_dict()
    layer = "a." * 1000 + "{0..19999}"
    norm = next(one for one in plan["parameters"] if one["name"] == "model.norm.weight")
    parameters = [*plan["parameters"], {**norm, "name": f"{layer}.norm.weight"}]
    section = {**plan["sequence_parallel"], "layers": [layer], "end": "model.norm"}
    refused(sealed(plan, parameters=parameters, sequence_parallel=section), "stream-place-outside")
    section |= {"layers": [*plan["sequence_parallel"]["layers"], "m.{0..299999}"], "scatter": ["m.{0..299999}"]}
    parameters = [*plan["parameters"], {**norm, "name": "m.{0..299999}.weight"}]
    refused(sealed(plan, parameters=parameters, sequence_parallel=section), "stream-order")


def test_a_million_ignored_names_are_not_too_many(llama: Path) -> None:
    data = sealed(compile_plan(llama, tp_size=2).to_dict(), ignored=[f"x.{MILLION}.w"])
    assert check_checkpoint(Plan.from_dict(data), llama) == []


def test_hints_are_not_looked_for_among_a_million_names(llama: Path) -> None:
    data = compile_plan(llama, tp_size=2).to_dict()
    one = next(entry for entry in data["parameters"] if entry["style"] == "replicated")
    many = [*data["parameters"], {**one, "name": "zz.{0..99}.{0..989}.w"}]
    ties = [{"name": f"t{i}", "to": f"zz.{i}.98 9.w", "style": "replicated", "rule": one["rule"]} for i in range(200)]
    refused(sealed(data, parameters=many, tied=ties), "tied-to-nothing")
    assert documents.did_you_mean("x" * 5000, ["y" * 5000]) == ""
    assert documents.did_you_mean("hiden_size", ["hidden_size", "b"]) == 'did you mean "hidden_size"?'


def test_rows_and_columns_in_one_module(llama: Path) -> None:
    """Each row is compared with every column of its module: 5,000 of both are 25 million pairs."""
    data = compile_plan(llama, tp_size=2).to_dict()
    by_style = {(entry["style"], "proj" in entry["name"]): entry for entry in data["parameters"]}
    column, row = by_style["column", True], by_style["row", True]
    many = [{**column, "name": "zz.a{0..4999}.weight"}, {**row, "name": "zz.b{0..4999}.weight"}]
    plan = Plan.from_dict(sealed(data, parameters=[*data["parameters"], *many]))
    check_plan(plan)
    assert len(rows(plan)) == len(plan.parameters)


def compiled(folder: Path, **spec: Any) -> str:
    try:
        compile_plan(folder, tp_size=3, preset="none", specs=[SpecFile.from_dict(spec)])
    except AutoTPError as error:
        return str(error)
    return ""


def rule(**keys: Any) -> list[dict[str, Any]]:
    return [{"patterns": [r".*q_proj\.weight$"], **keys}]


def test_symbols_that_double(llama: Path) -> None:
    symbols: dict[str, Any] = {f"s{i}": f"max(s{i + 1}, s{i + 1})" for i in range(40)}
    assert "more than 2000 steps" in compiled(llama, symbols={**symbols, "s40": 3}, layer_specs=rule(unit="s0"))
    fallbacks: dict[str, Any] = {f"s{i}": [f"s{i + 1} + x", f"s{i + 1} - y"] for i in range(40)}
    assert "a size cannot be resolved" in compiled(llama, symbols=fallbacks, layer_specs=rule(unit="s0"))
    chain: dict[str, Any] = {f"s{i}": f"s{i + 1}" for i in range(5000)}
    assert "more than 50 other symbols" in compiled(llama, symbols=chain, layer_specs=rule(unit="s0"))


def test_patterns_with_many_ways(llama: Path) -> None:
    for pattern in (r"(([a-z_.0-9])+)+!$", r"(.*)*(.*)*(.*)*x$", r"(.|.)*\1!"):
        text = compiled(llama, layer_specs=[{"patterns": [pattern]}])
        assert "a pattern matches no parameter" in text or "a pattern may take without end" in text
        text = compiled(llama, module_attributes=[{"patterns": [pattern], "attributes": {"x": 1}}])
        assert "no module" in text or "a pattern may take without end" in text


def test_patterns_without_number(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{"patterns": [f"a{i}!"], "optional": True} for i in range(matching.MAX_PATTERNS + 1)]
    assert "too many patterns for so many parameters" in compiled(llama, layer_specs=many)
    assert "too many patterns" not in compiled(llama, layer_specs=many[:50])
    monkeypatch.setattr(matching, "MAX_WORK", 1000)
    assert "50 patterns on 21 names" in compiled(llama, layer_specs=many[:50])


def test_a_million_sub_parameters(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ck", {"a.weight": (1_000_000, 1)}, {"model_type": "own"})
    text = compiled(folder, layer_specs=[{"patterns": [".*"], "shape": [1_000_000, 1]}])
    assert "at most 4096" in text
    text = compiled(folder, layer_specs=[{"patterns": [".*"], "shape": [4000, 250], "unit": 250}])
    assert "a sub-parameter is not whole units" in text


def test_layers_past_the_last_without_end(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    (folder / "config.json").write_text(json.dumps({**LLAMA_CONFIG, "num_nextn_predict_layers": 10**12}))
    text = compiled(folder, num_layers="num_hidden_layers", ignored_layers={"model.layers": "num_nextn_predict_layers"})
    assert "too many layers past the last" in text and "at most 100000" in text
    text = compiled(folder, num_layers=100_000, ignored_tensors=[f"x{i}.*.y" for i in range(100)])
    assert "the tensors that are ignored are too many" in text
