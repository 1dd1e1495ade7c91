"""Models of very many tensors: time grows as their number does, and more than a real model has are refused at once."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotp_plan.planner import SpecFile, check_checkpoint, check_plan, compile_plan, plan_table
from autotp_plan.planner.cli.main import main
from autotp_plan.planner.plan_table import as_json, describe, groups, json_pieces, rows, summary
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import CheckpointError, DocumentError, OptionError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage import checkpoint, safetensors_header
from autotp_plan.schemas.storage.safetensors_header import header_bytes, parse_header
from tests.helpers.checkpoints import write_checkpoint, write_llama

PER_LAYER = 1000
SPEC = SpecFile.from_dict(
    {"layer_specs": [{"patterns": [".*u$"]}, {"patterns": [".*d$"], "partition_type": "row"}]}  # up and down
)
MOST_GROWTH = 40.0
"""Of ten times as many tensors: quadratic is 100, and a machine that does much else makes 10 to 20."""


def experts(folder: Path, count: int) -> Path:
    """A checkpoint of `count` tensors, in layers of 500 experts' columns and rows in one module."""
    names = [f"l.{i // PER_LAYER}.e.{i % PER_LAYER // 2}.{'d' if i % 2 else 'u'}" for i in range(count)]
    folder.mkdir()
    header = header_bytes([(name, "U8", (2, 2)) for name in names], {})
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * count)
    (folder / "config.json").write_text('{"model_type": "own"}')
    return folder


@pytest.fixture(autouse=True)
def without_older_objects() -> Iterator[None]:
    """The garbage collector leaves alone what was there before: a process that has run other tests holds millions."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def times(folder: Path) -> tuple[dict[str, float], float]:
    """The processor time of each command's work, and of making the names of the plan's parameters."""
    plans: list[Plan] = []

    def compile_and_write() -> None:
        plans.append(compile_plan(folder, tp_size=2, preset="none", specs=[SPEC]))
        (folder / "plan.json").write_text(plans[0].to_json())

    found = {"compile": seconds(compile_and_write)}
    (plan,) = plans
    found["read"] = seconds(lambda: Plan.read(folder / "plan.json"))
    found["check"] = seconds(lambda: check_plan(plan))
    found["check the checkpoint"] = seconds(lambda: check_checkpoint(plan, folder))
    found["show"] = seconds(lambda: (groups(plan), describe(plan)))
    found["show as JSON"] = seconds(lambda: sum(map(len, json_pieces(plan))))
    return found, seconds(lambda: list(plan.expanded()))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("count", [4_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_time_grows_as_the_number_of_tensors(tmp_path: Path, count: int) -> None:
    few, _ = times(experts(tmp_path / "few", count))
    many, names = times(experts(tmp_path / "many", 10 * count))
    assert {what: many[what] / few[what] for what in few if many[what] > MOST_GROWTH * max(few[what], 0.01)} == {}
    # rows and columns of one module are compared by layout: 500 of each took 37 times as long as names
    assert many["check"] < 15 * names


def test_faults_of_every_row_are_bounded(tmp_path: Path) -> None:
    """Rows that no column fits, in one module with all columns: 12 layers of 250,000 pairs."""
    plan = compile_plan(experts(tmp_path / "ck", 12_000), tp_size=2, preset="none", specs=[SPEC])
    data = plan.to_dict()
    (row,) = (entry["layout"] for entry in data["parameters"] if entry["style"] == "row")
    data["layouts"][row]["intervals"].reverse()
    rest = {key: value for key, value in data.items() if key not in ("fingerprint", "rules")}
    wrong = Plan.from_dict({**rest, "fingerprint": documents.fingerprint(rest)})
    started = time.process_time()
    assert {fault.code for fault in check_plan(wrong)} == {"row-unlike-column"}
    assert time.process_time() - started < 10


def test_more_tensors_than_a_plan_may_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = experts(tmp_path / "ck", 30)
    for module in (safetensors_header, checkpoint):
        monkeypatch.setattr(module, "MAX_TENSORS", 29)
    with pytest.raises(CheckpointError) as caught:
        compile_plan(folder, tp_size=2, preset="none", specs=[SPEC])
    assert [(fault.code, fault.got) for fault in caught.value.faults] == [
        ("checkpoint-too-many-tensors", "more than 29 tensors")
    ]
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 30)  # of one file; of all files there are more
    with pytest.raises(CheckpointError, match="the checkpoint has too many tensors"):
        compile_plan(folder, tp_size=2, preset="none", specs=[SPEC])


def test_a_header_of_brackets_is_not_parsed() -> None:
    text = '{"a":[' + "[]," * 4_000_000 + "[]]}"
    started = time.process_time()
    with pytest.raises(CheckpointError, match="too many tensors"):
        parse_header(Path("x"), text)
    assert time.process_time() - started < 2


def test_a_name_of_very_many_modules() -> None:
    """A column is looked for in each module that its row is in: 20 names of 20,000 took 4 s, of 20 MB no end."""
    tensors = [("a." * 20_000 + f"{i}.w", "U8", (2, 2)) for i in range(20)]
    with pytest.raises(CheckpointError, match="a tensor with a name of 40003 characters, where 4096 are the most"):
        parse_header(Path("x"), header_bytes(tensors, {})[8:].decode())
    longest = header_bytes([("a" * 4096, "U8", (2, 2))], {})[8:].decode()
    assert len(parse_header(Path("x"), longest).tensors) == 1


def test_a_plan_that_could_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that do not fold, such as w0, w1, w2, are an entry each."""
    folder = write_checkpoint(tmp_path / "ck", {f"w{i}": (2, 2) for i in range(200)}, {"model_type": "own"})
    (tmp_path / "spec.json").write_text('{"layer_specs": [{"patterns": [".*"], "partition_type": "skip"}]}')
    args = ["compile", "--model", folder, "--tp", 2, "--preset", "none", "--spec", tmp_path / "spec.json", "-o"]
    done = CliRunner().invoke(main, [*map(str, args), str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.output
    size = (tmp_path / "plan.json").stat().st_size
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", size)
    assert Plan.read(tmp_path / "plan.json").to_json()
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", size - 1)
    done = CliRunner().invoke(main, [*map(str, args), str(tmp_path / "other.json")])
    assert done.exit_code == 2 and "the plan would be too large to be read again" in done.output
    assert not (tmp_path / "other.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(documents, "MAX_CONTAINERS", 100)
    with pytest.raises(DocumentError, match="too large to be read again"):
        compile_plan(folder, tp_size=2, preset="none", specs=[SpecFile.read(tmp_path / "spec.json")]).to_json()


def test_a_plan_of_many_entries_is_shown_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_table, "MOST_ROWS", 50)
    plan = compile_plan(write_llama(tmp_path / "llama"), tp_size=2)
    one = next(entry for entry in plan.to_dict()["parameters"] if entry["style"] == "replicated")
    data = {key: value for key, value in plan.to_dict().items() if key not in ("fingerprint", "rules")}
    data["parameters"] = [*data["parameters"], *({**one, "name": f"w{i}"} for i in range(50))]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**data, "fingerprint": documents.fingerprint(data)}))
    shown = CliRunner().invoke(main, ["show", str(path)]).output
    left = len(data["parameters"]) - 50
    assert f"not in the table: {left} more entries, which the plan file has" in shown
    assert "w0" in shown.split() and "w49" not in shown.split()


def test_many_ranks_cost_no_more_than_their_intervals(tmp_path: Path) -> None:
    """65,536 ranks and 100,000 parameters: each number is worked out once for a layout, not for each parameter."""
    plan = compile_plan(write_llama(tmp_path / "llama"), tp_size=2)
    data = {key: value for key, value in plan.to_dict().items() if key not in ("fingerprint", "rules")}
    one = next(entry for entry in data["parameters"] if entry["style"] == "replicated")
    data["parameters"] = [{**one, "name": f"w{i}"} for i in range(10_000)]
    data |= {"tp_size": 65536, "layouts": {one["layout"]: data["layouts"][one["layout"]]}}
    data = {key: value for key, value in data.items() if key in ("format", "version", "model", "tp_size", "layouts",
                                                                 "parameters")}  # fmt: skip
    wide = Plan.from_dict({**data, "fingerprint": documents.fingerprint(data)})
    started = time.process_time()
    assert len(rows(wide)) == 10_000
    assert len(set(summary(wide).per_rank)) == 1
    assert time.process_time() - started < 5
    with pytest.raises(OptionError, match="too large to be shown as JSON"):
        as_json(wide)


def test_json_in_pieces_is_json_dumps_with_an_indent(tmp_path: Path) -> None:
    plan = compile_plan(write_llama(tmp_path / "llama"), tp_size=2)
    assert "".join(json_pieces(plan)) == json.dumps(as_json(plan), indent=1)
    assert [entry["name"] for entry in as_json(plan)["parameters"]] == [entry.name for entry in plan.expanded()]
