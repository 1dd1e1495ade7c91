"""Whatever the input, the only exception is AutoTPError, and the command ends with 0 or 2."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotp_plan.planner import SpecFile, check_checkpoint, check_plan, compile_plan, presplit
from autotp_plan.planner.cli.main import main
from autotp_plan.planner.deepspeed.read_config import parse_section
from autotp_plan.planner.diff.compare import compare_plans
from autotp_plan.planner.diff.text import groups, lines
from autotp_plan.planner.pictures.layer_svg import layer_svg
from autotp_plan.planner.pictures.page import page
from autotp_plan.planner.plan_table import as_json, rows, summary
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import AutoTPError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.safetensors_header import read_header
from tests.helpers.checkpoints import LLAMA_CONFIG, llama_shapes, write_checkpoint

pytestmark = pytest.mark.sweep

SETTINGS = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**62, 2**64, -(2**63), 1.0, 2.5, 1e308]),
    st.text(max_size=8),
    st.sampled_from(["", "\ud800", "\0", "a\nb", "{0..3}", "{", "(", ".*", "[/b]", "BF16", "column"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
NAMES = sorted(llama_shapes())
SIZES = st.one_of(
    st.integers(-2, 70),
    st.sampled_from(["hidden_size", "num_attention_heads * 4", "nope", "-1", "1 //0", "(", "q_size", "tp_size", "a.b"]),
)
PATTERNS = st.one_of(
    st.sampled_from(
        [
            r".*",
            r".*\.weight$",
            r".*\.[qkv]_proj\.weight$",
            r".*_proj",
            r"lm_head",
            "(",
            "[",
            "(?P<a>",
            "a{99999}",
            r".*self_attn$",
            r".*norm.*",
            "\\",
        ]
    ),
    st.sampled_from(NAMES),
    st.text(min_size=1, max_size=6),
)
SPECS = st.fixed_dictionaries(
    {"patterns": st.lists(PATTERNS, min_size=1, max_size=2)},
    optional={
        "partition_type": st.sampled_from(["column", "row", "skip", "vocab", "COLUMN", "column\n"]),
        "shape": st.lists(st.one_of(SIZES, st.lists(SIZES, min_size=1, max_size=3)), min_size=1, max_size=4),
        "partition_dim": st.integers(0, 7), "gather_output": st.booleans(), "grad_allreduce": st.booleans(),
        "unit": st.one_of(SIZES, st.lists(SIZES, min_size=1, max_size=3)),
        "indivisible": st.sampled_from(["error", "uneven"]), "optional": st.booleans(),
        "model_types": st.lists(st.sampled_from(["llama", "x"]), max_size=2),
    },
)  # fmt: skip
SPEC_FILES = st.fixed_dictionaries(
    {},
    optional={
        "layer_specs": st.lists(SPECS, max_size=3),
        "vocabulary_specs": st.lists(SPECS, max_size=2),
        "use_default_specs": st.booleans(),
        "name": st.text(max_size=5),
        "num_layers": SIZES,
        "symbols": st.dictionaries(
            st.sampled_from(["q_size", "hidden_size", "a"]), st.one_of(SIZES, st.lists(SIZES, min_size=1, max_size=2))
        ),
        "defaults": st.dictionaries(
            st.sampled_from(["q_size", "hidden_size"]), st.one_of(st.integers(), st.none(), st.text(max_size=3))
        ),
        "module_attributes": st.lists(
            st.fixed_dictionaries(
                {
                    "patterns": st.lists(PATTERNS, min_size=1, max_size=1),
                    "attributes": st.dictionaries(st.sampled_from(["a", "config.b", "1"]), SIZES, max_size=2),
                }
            ),
            max_size=2,
        ),
        "tied": st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(NAMES), "to": st.sampled_from([*NAMES, "x"])}), max_size=2
        ),
        "ignored_tensors": st.lists(st.sampled_from([*NAMES, "model.layers.*.x", "*", "{", "{0..3}"]), max_size=2),
        "renamed_tensors": st.dictionaries(
            st.sampled_from(NAMES), st.sampled_from([*NAMES, "x.0", "{", "#", ""]), max_size=2
        ),
    },
)
SECTIONS = st.one_of(
    st.dictionaries(
        st.sampled_from(
            [
                "autotp_size",
                "preset_model",
                "partition_config",
                "dtype",
                "tp_overlap_comm",
                "tp",
                "nonsense",
                "tensor_parallel",
                "vocab_parallel_lm_head",
                "injection_policy_tuple",
                "keep_module_on_host",
            ]
        ),
        st.one_of(VALUES, SPEC_FILES),
        max_size=4,
    ),
    st.fixed_dictionaries({"autotp_size": st.integers(0, 9)}, optional={"partition_config": SPEC_FILES}),
    VALUES,
)


@cache
def llama() -> Path:
    return write_checkpoint(Path(tempfile.mkdtemp()) / "llama", llama_shapes(), LLAMA_CONFIG)


@cache
def planned() -> Path:
    """The checkpoint of `valid_plan`: one weight more than a Llama, one under another name."""
    shapes: dict[str, Any] = {**llama_shapes(), "viewed.weight": (8, 4), "norm.weight": (32,)}
    shapes["disk_norm.weight"] = shapes.pop("norm.weight")
    return write_checkpoint(Path(tempfile.mkdtemp()) / "planned", shapes, LLAMA_CONFIG)


@cache
def valid_plan() -> dict[str, Any]:
    spec = SpecFile.from_dict(
        {
            "module_attributes": [
                {"patterns": [r".*self_attn$"], "attributes": {"heads": "num_attention_heads // tp_size"}}
            ],
            "renamed_tensors": {"disk_norm.weight": "norm.weight"},
            "layer_specs": [
                {"patterns": [r"viewed\.weight$"], "shape": [2, -1, 4], "partition_dim": 1, "gather_output": True}
            ],
        }
    )
    return compile_plan(planned(), tp_size=2, specs=[spec]).to_dict()


def use(plan: Plan) -> None:
    """Everything that the planner does with a plan that it read."""
    check_plan(plan)
    rows(plan)
    summary(plan)
    as_json(plan)
    assert len(page(plan)) < 1_000_000
    ElementTree.fromstring(layer_svg(plan))
    differences = compare_plans(Plan.from_dict(valid_plan()), plan)
    assert groups(differences) or lines(differences)
    assert json.loads("".join(differences.json_pieces())) == differences.to_dict()
    assert compare_plans(plan, plan).equal
    assert Plan.from_dict(json.loads(plan.to_json())) == plan


def command(*arguments: Any) -> None:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code in (0, 2), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output


@SETTINGS
@given(
    spec=st.one_of(SPEC_FILES, VALUES),
    tp_size=st.integers(-1, 9),
    preset=st.sampled_from(["auto", "none", "llama", "phi3"]),
)
def test_any_spec(spec: Any, tp_size: int, preset: str) -> None:
    try:
        plan = compile_plan(llama(), tp_size=tp_size, preset=preset, specs=[SpecFile.from_dict(spec)])
    except AutoTPError:
        return
    use(plan)
    check_checkpoint(plan, llama())


@SETTINGS
@given(section=SECTIONS)
def test_any_deepspeed_section(section: Any) -> None:
    with contextlib.suppress(AutoTPError):
        use(compile_plan(llama(), deepspeed=parse_section(section)))


@SETTINGS
@given(config=st.dictionaries(st.sampled_from([*LLAMA_CONFIG, "head_dim"]), VALUES, max_size=3))
def test_any_config(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        (target / "model.safetensors").symlink_to(llama() / "model.safetensors")
        (target / "config.json").write_text(json.dumps({**LLAMA_CONFIG, **config}))
        try:
            plan = compile_plan(target, tp_size=2)
        except AutoTPError:
            return
        use(plan)
        assert check_checkpoint(plan, target) == []


def mutated(data: Any, draw: st.DrawFn) -> Any:
    """One value somewhere in a document deleted, replaced, copied from elsewhere or given a sibling."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(child, (dict, list)):
                walk(child)

    walk(data)
    node, key = draw(st.sampled_from(places))
    action = draw(st.sampled_from(["delete", "value", "number", "copy", "insert"]))
    if action == "delete":
        del node[key]
    elif action == "copy":
        other, at = draw(st.sampled_from(places))
        node[key] = (
            copy.deepcopy(other[at]) if at in (other if isinstance(other, dict) else range(len(other))) else None
        )
    elif action == "insert" and isinstance(node, dict):
        node[draw(st.text(max_size=5))] = draw(VALUES)
    elif action == "number" and isinstance(node[key], int):
        node[key] += draw(st.sampled_from([-1, 1, 2, -100, 2**40]))
    else:
        node[key] = draw(VALUES)
    return data


@st.composite
def plans(draw: st.DrawFn) -> Any:
    data = copy.deepcopy(valid_plan())
    for _ in range(draw(st.integers(1, 3))):
        data = mutated(data, draw)
    if draw(st.booleans()):
        try:
            data.pop("fingerprint", None)
            data["fingerprint"] = documents.fingerprint(data)
        except UnicodeEncodeError:
            data["fingerprint"] = "sha256:" + "0" * 64
    return data


def test_the_plan_that_is_mutated() -> None:
    use(Plan.from_dict(valid_plan()))


@settings(SETTINGS, max_examples=600)
@given(data=plans())
def test_any_plan(data: Any) -> None:
    try:
        plan = Plan.from_dict(documents.parse_json(json.dumps(data), "plan", "plan.json"))
    except AutoTPError:
        return
    use(plan)
    if plan.tp_size > 16:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            presplit(plan, planned(), Path(folder) / "out", workers=1)
        except AutoTPError:
            assert not (Path(folder) / "out").exists()


@settings(SETTINGS, max_examples=60)
@given(data=st.one_of(plans(), VALUES), text=st.one_of(st.none(), st.text(max_size=20)))
def test_the_command_with_any_plan(data: Any, text: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(json.dumps(data) if text is None else text, errors="surrogatepass")
        for arguments in (
            ["show", path],
            ["show", path, "--format", "json"],
            ["diff", path, path],
            ["check", path, "--checkpoint", planned()],
        ):
            command(*arguments)


@settings(SETTINGS, max_examples=60)
@given(spec=st.one_of(SPEC_FILES, VALUES), section=SECTIONS, tp=st.sampled_from(["2", "3", "0", "x"]))
def test_the_command_with_any_spec(spec: Any, section: Any, tp: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        (target / "spec.json").write_text(json.dumps(spec))
        (target / "ds.json").write_text(json.dumps({"tensor_parallel": section}))
        common = ("compile", "--model", llama(), "-o", target / "plan.json")
        command(*common, "--tp", tp, "--spec", target / "spec.json")
        command(*common, "--ds-config", target / "ds.json")
        if (target / "plan.json").exists():
            Plan.read(target / "plan.json")


@SETTINGS
@given(
    header=st.one_of(
        VALUES,
        st.dictionaries(
            st.text(max_size=4),
            st.fixed_dictionaries(
                {
                    "dtype": st.one_of(st.sampled_from(["F32", "U8", "F4"]), VALUES),
                    "shape": st.one_of(st.lists(st.integers(0, 3)), VALUES),
                    "data_offsets": st.one_of(st.lists(st.integers(0, 40), min_size=2, max_size=2), VALUES),
                }
            ),
            max_size=3,
        ),
    ),
    size=st.integers(0, 40),
)
def test_any_header(header: Any, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        raw = json.dumps(header).encode()
        path = Path(folder) / "model.safetensors"
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))
        try:
            read_header(path)
            use(
                compile_plan(
                    Path(folder),
                    tp_size=1,
                    specs=[SpecFile.from_dict({"layer_specs": [{"patterns": [".*"], "partition_type": "skip"}]})],
                )
            )
        except AutoTPError:
            pass
