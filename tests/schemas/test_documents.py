"""Documents: what is read back is what was written, and what is not a document is refused with a way out."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
import stat
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import compile_plan
from autotp_plan.schemas import documents
from autotp_plan.schemas.codec import decode, encode
from autotp_plan.schemas.errors import AutoTPError, DocumentError, Fault, visible, visible_json
from autotp_plan.schemas.layout import Layout, SubParameter, group_view, parameter_shape
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.manifest import Manifest, Owner, ShardFile, Source, SourceFile, shard_file_name
from autotp_plan.schemas.spec import SpecFile
from autotp_plan.schemas.storage.safetensors_header import BITS
from autotp_plan.schemas.untrusted import plain_files
from tests.helpers.checkpoints import write_llama

SCHEMAS = ["plan", "spec", "shards"]


def schema(name: str) -> Any:
    return json.loads(resources.files("autotp_plan.schemas").joinpath(f"{name}.schema.json").read_text())


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return compile_plan(write_llama(tmp_path_factory.mktemp("llama"), biases=True), tp_size=2)


@pytest.fixture
def data(plan: Plan) -> dict[str, Any]:
    return copy.deepcopy(plan.to_dict())


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """The plan with a fingerprint that fits, as an attacker would write it."""
    rest = {key: value for key, value in data.items() if key != "fingerprint"}
    return {**rest, "fingerprint": documents.fingerprint(rest)}


def refused(data: Any) -> list[Fault]:
    with pytest.raises(DocumentError) as caught:
        Plan.from_dict(data)
    return list(caught.value.faults)


# JSON


def test_read_back_is_what_was_written(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    documents.write_atomically(path, plan.to_json())
    assert Plan.read(path) == plan
    assert Plan.read(path).to_json() == path.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"], "no temporary file is left"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_same_plan_has_the_same_bytes(tmp_path: Path) -> None:
    folders = [write_llama(tmp_path / "a"), write_llama(tmp_path / "b", num_files=3)]
    texts = {compile_plan(folder, tp_size=4).to_json() for folder in folders}
    assert len(texts) == 1, "neither the folder's name nor the number of files is in the plan"


def test_write_atomically_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        documents.write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_format_is_json_on_short_lines() -> None:
    value = {"a": [1, 2, {"b": None}], "long": ["x" * 30] * 6, "é": "ü", "empty": {}, "deep": {"k": ["y" * 50] * 3}}
    text = documents.format_json(value, width=60)
    assert json.loads(text) == value
    assert max(map(len, text.splitlines())) <= 60
    assert '"a": [1, 2, {"b": null}]' in text
    assert text.endswith("}\n")


def test_fingerprint_ignores_the_order_of_keys_only() -> None:
    assert documents.fingerprint({"a": 1, "b": [1, 2]}) == documents.fingerprint({"b": [1, 2], "a": 1})
    assert documents.fingerprint({"b": [2, 1]}) != documents.fingerprint({"b": [1, 2]})
    assert documents.fingerprint({}) == "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize(
    ("text", "got"),
    [
        (b"{", "Expecting property name"), (b"", "Expecting value"), (b'{"a": 1, "a": 2}', "the key 'a' appears twice"),
        (b"[NaN]", "NaN is not JSON"), (b"\xff\xfe", "bytes that are not UTF-8 text"), (b'"\\ud800"', "surrogate"),
        (b"[" * 100_000, "recursion"), (b"[" + b"9" * 5000 + b"]", "digits"),
    ],
)  # fmt: skip
def test_what_is_not_json_is_refused_with_the_place(tmp_path: Path, text: bytes, got: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text)
    with pytest.raises(DocumentError) as caught:
        documents.read_json(path, "plan")
    (fault,) = caught.value.faults
    assert (fault.what, fault.where) == ("the plan is not JSON", str(path))
    assert got in fault.got


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert documents.parse_json('"\\ud83d\\ude00"', "plan", "x") == "😀"


def test_missing_and_huge_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DocumentError, match="cannot read the plan"):
            documents.read_json(path, "plan")
    (tmp_path / "big.json").write_text(" " * 20)
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 10)
    with pytest.raises(DocumentError, match="too large"):
        documents.read_json(tmp_path / "big.json", "plan")


def test_paths_are_dotted() -> None:
    assert documents.dotted(["layer_specs", 2, "shape", 0]) == "layer_specs[2].shape[0]"
    assert documents.dotted([]) == ""


# the schemas


def fields(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    for key, child in node.get("properties", {}).items():
        yield f"{path}.{key}", child
        yield from fields(child, f"{path}.{key}")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from fields(node[key], f"{path}[]")
    for key, child in node.get("$defs", {}).items():
        yield from fields(child, f"{path}#{key}")


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_field_has_a_description(name: str) -> None:
    found = dict(fields(schema(name), name))
    definitions = schema(name).get("$defs", {})
    for path, field in found.items():
        target = definitions.get(field.get("$ref", "").removeprefix("#/$defs/"), {})
        assert field.get("description") or target.get("description"), f"{path} has no description"
    assert len(found) > 10


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_sound_and_closed(name: str) -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(schema(name))
    for path, field in [(name, schema(name)), *fields(schema(name), name)]:
        if "properties" in field:
            assert field.get("additionalProperties") is False, f"{path} takes unknown keys"


def test_the_plan_schema_knows_the_dtypes_that_can_be_cut() -> None:
    assert schema("plan")["$defs"]["parameter"]["properties"]["dtype"]["enum"] == list(BITS)


# plans


def test_another_major_version_is_refused_before_anything_else(data: dict[str, Any]) -> None:
    (fault,) = refused({"version": "2.0", "new": "world"})
    assert fault == Fault(
        code="plan-version", what="the plan is of another format version", where="version", got="2.0", expected="1.x",
        next="compile the plan again with this version of autotp-plan, or install the version that wrote it",
    )  # fmt: skip
    assert Plan.from_dict(sealed({**data, "version": "1.7"})).version == "1.7"
    assert [fault.where for fault in refused(sealed({**data, "version": "1"}))] == ["version"]


def test_a_changed_plan_is_refused(data: dict[str, Any]) -> None:
    data["parameters"][0]["rule"] = "someone else's"
    (fault,) = refused(data)
    assert (fault.what, fault.where) == ("the plan was changed after it was compiled", "fingerprint")
    Plan.from_dict(sealed(data))


@pytest.mark.parametrize("wrong", [None, 3, "plan", [], {}])
def test_what_is_no_plan_is_refused(wrong: Any) -> None:
    assert all(fault.what.startswith("the plan ") for fault in refused(wrong))


def test_unknown_and_missing_keys_are_reported_together(data: dict[str, Any]) -> None:
    data["tpsize"] = data.pop("tp_size")
    data["parameters"][1]["stile"] = data["parameters"][1].pop("style")
    faults = {(fault.what, fault.where): fault for fault in refused(data)}
    assert faults["the plan has an unknown key", "tpsize"].next == 'did you mean "tp_size"?'
    assert faults["the plan has an unknown key", "parameters[1].stile"].next == 'did you mean "style"?'
    assert faults["the plan lacks a key", "the plan"].expected == '"tp_size"'
    assert faults["the plan lacks a key", "parameters[1]"].expected == '"style"'
    assert len(faults) == 4


def set_path(data: Any, path: list[Any], value: Any) -> None:
    for step in path[:-1]:
        data = data[step]
    if value is ...:
        del data[path[-1]]
    else:
        data[path[-1]] = value


LAYOUT = ["layouts", "32x32 dim 0"]


@pytest.mark.parametrize(
    ("path", "value", "where", "expected"),
    [
        (["tp_size"], 2.0, "tp_size", "positive integer"),
        (["tp_size"], True, "tp_size", "positive integer"),
        (["tp_size"], 3, "layouts.", "intervals inside"),
        (["parameters", 0, "dtype"], "F4", "parameters[0].dtype", "Dtype"),
        (["parameters", 0, "layout"], "64x32 dim 1", "parameters[0].layout", "a layout of this plan"),
        (["parameters", 1, "style"], "replicated", "parameters[1].style", "replicated, exactly where"),
        (["parameters", 0, "shape"], [8, 8], "parameters[0].shape", "a view of"),
        (["parameters", 0, "source"], "a.{0..1}", "parameters[0].source", "as many names"),
        (["parameters", 1, "gather_output"], True, "parameters[1].gather_output", "column"),
        (["parameters", 1, "partial_gradient"], True, "parameters[1].partial_gradient", "replicated"),
        (["parameters", 1, "name"], "lm_head.weight", "parameters[1].name", "each parameter once"),
        (["parameters", 0, "name"], "a.{0..999999}.w", "parameters[1].name", "at most 1000000"),
        (["parameters", 0, "name"], "a.{0..}", "a.{0..}", "numbers in braces"),
        (["parameters", 0, "name"], "\ud800", "parameters[0].name", ""),
        (["tied"], [{"name": "a", "to": "lm_haed.weight", "style": "vocab", "rule": "r"}], "tied[0].to", "a parameter"),
        (["tied"], [{"name": "lm_head.weight", "to": "lm_head.weight", "style": "column", "rule": "r"}],
         "tied[0].name", "a second name of a parameter"),
        (["module_attributes"], [{"module": "m", "attribute": "n", "values": [1, 2, 3]}],
         "module_attributes[0].values", "2, one per rank"),
        (["module_attributes"], [{"module": "m", "attribute": "__class__()", "values": [1, 2]}],
         "module_attributes[0].attribute", "Attribute"),
        (["ignored"], ["{"], "{", "numbers in braces"),
        ([*LAYOUT, "dim"], 2, "layouts.32x32 dim 0", "intervals inside"),
        ([*LAYOUT, "dim"], ..., "layouts.32x32 dim 0", "Without `dim`"),
        ([*LAYOUT, "intervals"], ..., "layouts.32x32 dim 0", "Without `dim`"),
        ([*LAYOUT, "intervals"], [[[0, 16]], [[16, 31]]], "layouts.32x32 dim 0", "intervals inside"),
        ([*LAYOUT, "intervals"], [[[0, 16]], [[15, 32]]], "layouts.32x32 dim 0", "boundaries between units"),
        ([*LAYOUT, "intervals"], [[[0, 16]], [[16, 33]]], "layouts.32x32 dim 0", "intervals inside"),
        ([*LAYOUT, "intervals"], [[[0, 16]], [[16, 32, 33]]], "layouts.32x32 dim 0.intervals[1][0]", "[start, stop]"),
        ([*LAYOUT, "sub_parameters"], [[16, 4]], "layouts.32x32 dim 0", "intervals inside"),
        ([*LAYOUT, "sub_parameters"], [[32, 5]], "layouts.32x32 dim 0", "intervals inside"),
        ([*LAYOUT, "sub_parameters"], [[32, 0]], "layouts.32x32 dim 0.sub_parameters[0][1]", "minimum"),
        (["model", "inventory"], "sha256:1", "model.inventory", "Hash over"),
        (["runtime"], {"dtype": "int8"}, "runtime.dtype", "float32, float16 or bfloat16"),
    ],
)  # fmt: skip
def test_plans_that_contradict_themselves(
    data: dict[str, Any], path: list[Any], value: Any, where: str, expected: str
) -> None:
    set_path(data, path, value)
    if value == "\ud800":
        with pytest.raises(DocumentError, match="not JSON"):
            documents.parse_json(json.dumps(data), "plan", "plan.json")
        return
    fault = refused(sealed(data))[0]
    assert fault.where.startswith(where), fault
    assert expected in fault.expected + fault.next, fault


def test_uneven_cut_inside_a_unit_is_refused(data: dict[str, Any]) -> None:
    layout = data["layouts"]["32x32 dim 0"]
    assert layout["sub_parameters"] == [[32, 8]]
    layout["intervals"] = [[[0, 14]], [[14, 32]]]
    assert "a boundary at 14, inside a unit of 8 that begins at 8" in {fault.got for fault in refused(sealed(data))}


def test_lists_within_lists_are_refused(data: dict[str, Any]) -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    data["notes"] = deep
    assert refused(data)


# specs and manifests


def test_spec_faults_say_what_was_meant() -> None:
    wrong = {
        "layer_spec": [],
        "layer_specs": [
            {"pattern": ["x"]},
            {"patterns": ["x"], "partition_type": "columns"},
            {"patterns": [], "shape": [[], -1]},
            {"patterns": ["x"], "partition_type": "row\n", "partition_dim": 1.0},
        ],
    }
    with pytest.raises(DocumentError) as caught:
        SpecFile.from_dict(wrong)
    faults = {(fault.where, fault.what): fault for fault in caught.value.faults}
    assert faults["layer_spec", "the spec file has an unknown key"].next == 'did you mean "layer_specs"?'
    assert faults["layer_specs[0].pattern", "the spec file has an unknown key"].next == 'did you mean "patterns"?'
    assert faults["layer_specs[0]", "the spec file lacks a key"].expected == '"patterns"'
    value = "the spec file has a wrong value"
    assert faults["layer_specs[1].partition_type", value].got == '"columns"'
    assert "column (split output features)" in faults["layer_specs[1].partition_type", value].expected
    assert faults["layer_specs[2].patterns", value].got == "[]"
    assert ("layer_specs[2].shape[0]", value) in faults
    assert ("layer_specs[3].partition_type", value) in faults
    assert ("layer_specs[3].partition_dim", value) in faults
    assert len(faults) == 8


def test_spec_fields_are_read() -> None:
    read = SpecFile.from_dict(
        {
            "layer_specs": [
                {"patterns": ["a", "b"], "partition_type": "Row", "shape": [["q", 2], -1], "partition_dim": 0,
                 "model_types": ["x"], "unit": ["h", 1], "indivisible": "uneven", "optional": True},
                {"patterns": ["c"], "gather_output": True, "shape": None, "model_types": None, "partition_dim": None},
            ],
            "symbols": {"q": ["a", "b"], "h": 3},
        }
    )  # fmt: skip
    first, second = read.layer_specs
    assert (first.partition_type, first.shape, first.unit) == ("row", (("q", 2), -1), ("h", 1))
    assert (first.model_types, first.partition_dim, first.indivisible, first.optional) == (("x",), 0, "uneven", True)
    assert (second.partition_type, second.gather_output, second.shape) == ("column", True, None)
    assert read.symbols == {"q": ("a", "b"), "h": (3,)}
    assert read.use_default_specs


def test_manifest_reads_back() -> None:
    manifest = Manifest(
        plan="sha256:" + "0" * 64, tp_size=2,
        files=(
            ShardFile(name="chat template (old).jinja", size=3, crc32="1" * 8),
            ShardFile(name="shared.00001-of-00001.safetensors", size=0, crc32="2" * 8, owner=Owner.ALL_RANKS),
            ShardFile(name="unused.00001-of-00001.safetensors", size=1, crc32="5" * 8, owner=Owner.NO_RANK),
            ShardFile(name="tp-00-of-02.00001-of-00001.safetensors", size=7, crc32="3" * 8, owner=0),
        ),
        source=Source(
            fingerprint="sha256:" + "4" * 64,
            files=(SourceFile(name="model.safetensors", header='{"a":{"dtype":"U8","shape":[0]}}  '),),
        ),
    )  # fmt: skip
    assert Manifest.from_dict(json.loads(manifest.to_json())) == manifest
    ranks = [(entry.get("rank", "absent"), entry.get("unused")) for entry in manifest.to_dict()["files"]]
    assert ranks == [("absent", None), (None, None), ("absent", True), (0, None)]
    assert shard_file_name(Owner.ALL_RANKS, 2, 0, 1) == "shared.00001-of-00001.safetensors"
    assert shard_file_name(Owner.NO_RANK, 2, 0, 1) == "unused.00001-of-00001.safetensors"
    assert shard_file_name(3, 16, 1, 12) == "tp-03-of-16.00002-of-00012.safetensors"


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "..", ".hidden", "a/b", "a\\b", "", "a\nb", "a\0"])
def test_manifests_name_files_of_their_folder_only(name: str) -> None:
    files = [{"name": name, "size": 1, "crc32": "0" * 8}]
    zero = "sha256:" + "0" * 64
    data: dict[str, Any] = {"format": "autotp-shards", "version": "2.0", "plan": zero, "tp_size": 1, "files": files}
    data["source"] = {"fingerprint": zero, "files": []}
    data["fingerprint"] = documents.fingerprint(data)
    with pytest.raises(DocumentError, match=r"files\[0\].name"):
        Manifest.from_dict(data)
    with pytest.raises(DocumentError, match="another format version"):
        Manifest.from_dict({**data, "version": "9.0"})


# layouts and errors


def test_dimensions_of_a_view_are_grouped_by_those_of_the_shape() -> None:
    assert group_view((8, 6), (2, 4, 6)) == [range(2), range(2, 3)]
    assert group_view((8, 6), (8, 6)) == [range(1), range(1, 2)]
    assert group_view((8, 6), (6, 8)) is None
    assert group_view((8, 6), (48,)) is None
    assert group_view((), ()) == []
    assert parameter_shape((8, 6), (2, 4, 6), (2, 1, 6)) == (2, 6)


def test_a_layout_gives_shape_and_intervals_of_each_rank() -> None:
    cut = Layout(shape=(4, 6), dim=1, sub_parameters=(SubParameter(size=6, unit=2),), intervals=(((0, 4),), ((4, 6),)))
    assert (cut.rank_shape(0), cut.rank_shape(1), cut.rank_intervals(1)) == ((4, 4), (4, 2), ((4, 6),))
    assert (cut.name, Layout(shape=()).name, Layout(shape=(3,)).name) == ("4x6 dim 1", "scalar whole", "3 whole")
    assert decode(Layout, encode(cut)) == cut
    assert Layout(shape=(3, 2)).rank_intervals(5) == ((0, 3),)


def test_errors_sort_their_faults_and_survive_pickling() -> None:
    faults = [Fault(what="b", where="z"), Fault(what="b", where="a"), Fault(what="a", where="a", got="1"),
              Fault(what="b", where="z")]  # fmt: skip
    error = AutoTPError(faults)
    assert [(fault.where, fault.what) for fault in error.faults] == [("a", "a"), ("a", "b"), ("z", "b")]
    copied = pickle.loads(pickle.dumps(DocumentError(faults)))
    assert type(copied) is DocumentError
    assert copied.faults == error.faults
    assert str(Fault(what="w", where="x", got="g", expected="e", next="n")).splitlines() == [
        "w", "  where:    x", "  got:      g", "  expected: e", "  next:     n"
    ]  # fmt: skip


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "plan.json", tmp_path / "link.json"
    link.symlink_to(target)
    for text in ("new", "again"):  # a link to nothing yet, and one to a file
        documents.write_atomically(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["plan.json"]


def test_what_is_no_plain_file_is_neither_replaced_nor_read(tmp_path: Path) -> None:
    """A pipe, which stands here for a device too, and a link to it: root could replace /dev/null."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(OSError, match="no plain file"):
            documents.write_atomically(path, "text")
        with pytest.raises(DocumentError) as caught:
            documents.read_json(path, "config.json", plain=True)
        assert caught.value.faults[0].got == "no plain file"
    assert stat.S_ISFIFO(pipe.stat().st_mode) and link.is_symlink()
    with pytest.raises(DocumentError, match="Is a directory"):
        documents.read_json(tmp_path, "plan")


def test_a_document_that_a_shell_writes_is_read() -> None:
    """As in `--spec <(jq . spec.json)`."""
    reader, writer = os.pipe()
    os.write(writer, b'{"layer_specs": []}')
    os.close(writer)
    assert documents.read_json(Path(f"/dev/fd/{reader}"), "spec file") == {"layer_specs": []}
    os.close(reader)


def test_control_characters_of_names_are_written_out() -> None:
    fault = Fault(what="a name", where="\x1b[31mred\x07", got="two\nlines\tand a tab", next="\x9b2J")
    text = str(fault)
    assert "\\x1b[31mred\\x07" in text and "\\x9b2J" in text and "two\nlines\tand a tab" in text
    assert not set(text) & set("\x1b\x07\x9b")


def kinds_of_no_file(folder: Path) -> list[Path]:
    """A pipe with a name, a socket, a device (where one may be made: the machine's), and links to them."""
    pipe, link, zero = folder / "pipe", folder / "link", folder / "zero"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    zero.symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket"))
    server.close()
    return [pipe, link, zero, folder / "socket"]


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_read_wherever_a_document_is_given(tmp_path: Path) -> None:
    """Without a writer a pipe would be waited for; /dev/zero never ends."""
    for path in kinds_of_no_file(tmp_path):
        for read in (Plan.read, SpecFile.read, lambda p: documents.read_json(p, "DeepSpeed config")):
            with pytest.raises(DocumentError) as caught:
                read(path)
            (fault,) = caught.value.faults
            assert fault.got in ("no plain file", "No such device or address"), fault
    assert plain_files.not_plain(tmp_path) == ["link", "pipe", "socket", "zero"]


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    for path in kinds_of_no_file(tmp_path):
        before = path.stat().st_mode, path.is_symlink()
        with pytest.raises(OSError, match="no plain file"):
            documents.write_atomically(path, "text")
        assert (path.stat().st_mode, path.is_symlink()) == before
    assert len(list(tmp_path.iterdir())) == 4, "no temporary file is left"


def test_a_file_that_is_replaced_keeps_who_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    path.chmod(0o600)
    documents.write_atomically(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600


def test_a_shells_pipe_that_gives_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_files, "PIPE_SECONDS", 0.1)
    reader, writer = os.pipe()
    with pytest.raises(DocumentError, match="gave nothing for"):
        documents.read_json(Path(f"/dev/fd/{reader}"), "spec file")
    os.close(writer)
    os.close(reader)


def test_a_document_of_nothing_but_brackets_is_too_large(tmp_path: Path) -> None:
    """Two bytes each on disk, 64 in memory."""
    path = tmp_path / "plan.json"
    path.write_text("[" + "[]," * documents.MAX_CONTAINERS + "[]]")
    with pytest.raises(DocumentError, match="too large"):
        documents.read_json(path, "plan")


def test_what_turns_the_direction_of_text_is_written_out() -> None:
    text = "safe\u202egnp.exe\u2066\ud800\ufeff"
    assert visible(text) == r"safe\u202egnp.exe\u2066\ud800\ufeff"
    assert json.loads(visible_json(json.dumps("a\u202eb\x9b", ensure_ascii=False))) == "a\u202eb\x9b"
    assert visible("ä 漢字 😀\n\tx") == "ä 漢字 😀\n\tx"
