"""Parameters that are several tensors on disk: the bytes where torch's stacking and slicing puts them, and what is
refused."""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from autotp_plan.planner import SpecFile, check_checkpoint, compile_plan, presplit
from autotp_plan.planner.copying import copy_engine
from autotp_plan.runtime.loading import read_weights, weights
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import AutoTPError, CheckpointError, DocumentError, MismatchError, OutputError
from autotp_plan.schemas.plan.document import Parameter, Plan, Sources
from autotp_plan.schemas.shards.manifest import PLAN_NAME
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.sparse import write_sparse_checkpoint

ASSEMBLED = {
    "l.*.experts.gate_up": ["l.*.moe.*.w1", "l.*.moe.*.w3"],
    "l.*.experts.down": ["l.*.moe.*.w2"],
    "l.*.experts.bias": ["l.*.moe.*.b"],
    "l.*.qkv": ["l.*.q", "l.*.kv"],
    "whole": ["part.a", "part.b"],
}
SPEC = SpecFile.from_dict(
    {
        "assembled_tensors": ASSEMBLED,
        "renamed_tensors": {"l.*.old": "l.*.new"},
        "layer_specs": [
            {"patterns": [r".*gate_up$"], "partition_type": "shard", "partition_dim": 1, "shape": [-1, 2, -1],
             "indivisible": "uneven"},
            {"patterns": [r".*down$"], "partition_type": "shard", "partition_dim": 2, "indivisible": "uneven"},
            {"patterns": [r".*bias$", "whole$", r".*new$"], "partition_type": "skip"},
            {"patterns": [r".*qkv$"], "partition_type": "shard", "indivisible": "uneven"},
        ],
    }
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    layers: int
    experts: int
    inner: int
    hidden: int
    tp_size: int
    num_files: int
    chunk: int
    dtype: torch.dtype

    def tensors(self) -> dict[str, torch.Tensor]:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, expert in itertools.product(range(self.layers), range(self.experts)):
            prefix = f"l.{layer}.moe.{expert}"
            shapes |= {f"{prefix}.w1": (self.inner, self.hidden), f"{prefix}.w2": (self.hidden, self.inner)}
            shapes |= {f"{prefix}.w3": (self.inner, self.hidden), f"{prefix}.b": (self.hidden,)}
        for layer in range(self.layers):
            shapes |= {f"l.{layer}.q": (self.inner, 3), f"l.{layer}.kv": (2, 3), f"l.{layer}.old": (2, 2)}
        shapes |= {"part.a": (1, 2), "part.b": (3, 2)}
        made = {}
        for seed, (name, shape) in enumerate(shapes.items()):
            size = torch.empty(shape, dtype=self.dtype)
            raw = torch.randint(
                256, (size.numel() * size.element_size(),), generator=torch.Generator().manual_seed(seed)
            )
            made[name] = raw.to(torch.uint8).view(self.dtype).reshape(shape)
        return made

    def write(self, folder: Path) -> dict[str, torch.Tensor]:
        """A checkpoint whose tensors are dealt out to files one by one."""
        tensors = self.tensors()
        weight_map = {}
        names = sorted(tensors)
        for part in range(self.num_files):
            mine = names[part :: self.num_files]
            save_file({name: tensors[name] for name in mine}, folder / f"{part}.safetensors")
            weight_map.update(dict.fromkeys(mine, f"{part}.safetensors"))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return tensors

    def expected(self, tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
        """A rank's parameters by torch.stack, torch.cat and torch.tensor_split, without an interval."""

        def stack(layer: int, leaf: str) -> torch.Tensor:
            return torch.stack([tensors[f"l.{layer}.moe.{expert}.{leaf}"] for expert in range(self.experts)])

        def part(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            return tensor.tensor_split(self.tp_size, dim)[rank]

        found = {"whole": torch.cat([tensors["part.a"], tensors["part.b"]])}
        for layer in range(self.layers):
            gate_up = [part(stack(layer, leaf), 1) for leaf in ("w1", "w3")]
            found[f"l.{layer}.experts.gate_up"] = torch.cat(gate_up, 1)
            found[f"l.{layer}.experts.down"] = part(stack(layer, "w2"), 2)
            found[f"l.{layer}.experts.bias"] = stack(layer, "b")
            found[f"l.{layer}.qkv"] = part(torch.cat([tensors[f"l.{layer}.q"], tensors[f"l.{layer}.kv"]]), 0)
            found[f"l.{layer}.new"] = tensors[f"l.{layer}.old"]
        return found


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def shards(output: Path, rank: int) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    found = {}
    for path in (*output.glob(f"tp-{rank:02d}-*.safetensors"), *output.glob("shared.*.safetensors")):
        with safe_open(path, "pt") as opened:
            found.update({name: raw(opened.get_tensor(name)) for name in opened.keys()})  # noqa: SIM118
    return found


def compiled(folder: Path, tp_size: int) -> Plan:
    plan = compile_plan(folder, tp_size=tp_size, preset="none", specs=[SPEC])
    assert Plan.from_dict(json.loads(plan.to_json())) == plan
    return plan


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 2),
    experts=st.integers(1, 12),
    inner=st.integers(3, 5),
    hidden=st.integers(1, 3),
    tp_size=st.integers(1, 3),
    num_files=st.integers(1, 4),
    chunk=st.sampled_from([1, 16, 50, 1 << 20]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]),
)
def test_presplit_and_direct_reads_are_what_torch_makes(**sizes: Any) -> None:
    case = Case(**sizes)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder, output = Path(name), Path(name) / "shards"
        tensors = case.write(folder)
        plan = compiled(folder, case.tp_size)
        patch.setattr(copy_engine, "CHUNK_BYTES", case.chunk)
        patch.setattr(read_weights, "CHUNK_BYTES", max(4, case.chunk))
        steps: list[tuple[int, int]] = []
        manifest = presplit(plan, folder, output, progress=lambda *step: steps.append(step))
        copied = sum(file.size for file in manifest.files if file.owner is None and file.name != PLAN_NAME)
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + copied
        assert steps[-1] == (total, total) and [step[0] for step in steps].count(total) == 1
        for rank in range(case.tp_size):
            wanted = {name: raw(tensor) for name, tensor in case.expected(tensors, rank).items()}
            assert shards(output, rank) == wanted
            for source in (folder, output):
                direct = {
                    weight.name: read_weights.read_weight(weight, torch.device("cpu"), None)
                    for weight in weights.open_weights(source, plan).of_rank(rank)
                }
                assert {name: raw(tensor) for name, tensor in direct.items()} == wanted


CASE = Case(
    layers=2, experts=3, inner=4, hidden=2, tp_size=2, num_files=3, chunk=64, dtype=torch.bfloat16,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    CASE.write(folder)
    return folder


def test_only_the_rank_s_bytes_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    plan = compiled(folder, 2)
    read = 0
    preadv = os.preadv

    def counted(descriptor: int, views: Any, at: int) -> int:
        nonlocal read
        read += preadv(descriptor, views, at)
        return sum(map(len, views))

    source = weights.open_weights(folder, plan)
    monkeypatch.setattr(os, "preadv", counted)
    tensors = [read_weights.read_weight(weight, torch.device("cpu"), None) for weight in source.of_rank(1)]
    assert read == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_checkpoint_in_the_new_form_is_used_as_it_is(tmp_path: Path) -> None:
    old = CASE.tensors()
    whole = Case(**{**CASE.__dict__, "tp_size": 1}).expected(old, 0)
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, tmp_path / "model.safetensors")
    new = compiled(tmp_path, 2)
    assert all(entry.sources is None and entry.source is None for entry in new.parameters)
    (tmp_path / "old").mkdir()
    CASE.write(tmp_path / "old")
    plan = compiled(tmp_path / "old", 2)
    assert plan.model.inventory == new.model.inventory
    assert plan.layouts == new.layouts
    found = {(fault.what, fault.where) for fault in check_checkpoint(plan, tmp_path)}
    assert ("a tensor of the plan is missing", "l.{0..1}.moe.{0..2}.w1") in found
    assert ("the checkpoint has a tensor that the plan does not know", "l.{0..1}.experts.gate_up") in found


SHAPES = {name: tuple(tensor.shape) for name, tensor in CASE.tensors().items()}
LACKS = "the checkpoint lacks a tensor of a parameter that is several on disk"
UNLIKE = "tensors that make up one parameter differ"


def refused(folder: Path) -> list[tuple[str, str, str]]:
    with pytest.raises(CheckpointError) as caught:
        compiled(folder, 2)
    return [(fault.what, fault.where, fault.got) for fault in caught.value.faults]


@pytest.mark.parametrize(
    ("without", "faults"),
    [
        (r"l.1.moe.1.w3", [("l.1.moe.1.w3", "2 of 3 tensors")]),
        (r"l.0.moe.2.w2", [("l.0.moe.2.w2", "2 of 3 tensors")]),
        (r"part.b", [("part.b", "0 of 1 tensors")]),
        ("w3", [("l.{0..1}.moe.0.w3", "0 of 3 tensors")]),
        ("moe.0", [(f"l.{{0..1}}.moe.0.{leaf}", "2 of 3 tensors") for leaf in ("b", "w1", "w2", "w3")]),
        ("l.1.moe.2", [(f"l.1.moe.2.{leaf}", "2 of 3 tensors") for leaf in ("b", "w1", "w2", "w3")]),
    ],
)
def test_the_first_missing_tensor_is_named(tmp_path: Path, without: str, faults: list[tuple[str, str]]) -> None:
    """A gap, the last one of one kind, one kind altogether, an expert altogether: the first missing one is named."""
    write_checkpoint(tmp_path, {name: shape for name, shape in SHAPES.items() if without not in name})
    assert refused(tmp_path) == [(LACKS, where, got) for where, got in faults]


def test_a_huge_expert_number_costs_no_memory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {**SHAPES, "l.0.moe.999999999.w1": (4, 2)})
    found = {where: got for _, where, got in refused(tmp_path)}
    assert found["l.0.moe.3.w1"] == "4 of 1000000000 tensors"
    assert found["l.{0..1}.moe.3.w2"] == "3 of 1000000000 tensors"


def test_tensors_of_other_shapes_or_dtypes_cannot_be_fused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", {**SHAPES, "l.0.moe.1.w1": (4, 3), "l.1.moe.2.w2": (1, 8)})
    assert refused(tmp_path / "a") == [
        (UNLIKE, "l.0.moe.1.w1", "BF16 of [4, 3]"),
        (UNLIKE, "l.1.moe.2.w2", "BF16 of [1, 8]"),
    ]
    write_checkpoint(tmp_path / "b", SHAPES, dtype={"l.0.moe.1.w3": "F16", "part.b": "F32"})
    assert refused(tmp_path / "b") == [
        (UNLIKE, "l.0.moe.1.w3", "F16 of [4, 2]"),
        (UNLIKE, "part.b", "F32 of [3, 2]"),
    ]
    write_checkpoint(tmp_path / "c", {**SHAPES, "part.b": (3, 3), "l.0.q": ()})
    assert refused(tmp_path / "c") == [
        ("tensors that make up one parameter do not fit together", "l.0.qkv", "[], [2, 3]"),
        ("tensors that make up one parameter do not fit together", "whole", "[1, 2], [3, 3]"),
    ]


def test_a_parameter_stored_fused_and_unfused_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {**SHAPES, "l.1.experts.down": (3, 2, 4)})
    assert refused(tmp_path) == [
        (
            "two tensors of the checkpoint are one parameter",
            "l.1.experts.down",
            "l.1.experts.down and l.1.moe.*.w2",
        )
    ]


def test_braces_in_a_numbered_name(tmp_path: Path) -> None:
    spec = SpecFile.from_dict({"assembled_tensors": {"x": ["{.*.w"]}})
    write_checkpoint(tmp_path, {"{.0.w": (2, 2)})
    with pytest.raises(CheckpointError, match="a tensor's name has a brace"):
        compile_plan(tmp_path, tp_size=1, preset="none", specs=[spec])


def changed(shapes: dict[str, tuple[int, ...] | None]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in {**SHAPES, **shapes}.items() if shape is not None}


@pytest.mark.parametrize(
    ("shapes", "what", "where"),
    [
        ({"l.1.moe.1.w3": None}, "a tensor of the plan is missing", "l.1.moe.1.w3"),
        ({"l.1.moe.1.w3": (2, 4)}, "not what the plan says", "l.1.moe.1.w3"),
        ({"l.1.moe.3.w1": (4, 2)}, "does not know", "l.1.moe.3.w1"),
        ({f"l.1.moe.{e}.w{n}": (5, 2) for e in range(3) for n in (1, 3)}, "not what the plan", "l.1.experts.gate_up"),
        ({f"l.1.moe.{e}.w1": (8,) for e in range(3)}, "not what the plan says", "l.1.experts.gate_up"),
        ({f"l.1.moe.{e}.w2": (4, 2) for e in range(3)}, "not what the plan says", "l.1.experts.down"),
        ({"part.a": (2, 2)}, "not what the plan says", "whole"),
    ],
)  # fmt: skip
def test_another_checkpoint_is_refused_alike_by_all(
    folder: Path, tmp_path: Path, shapes: dict[str, tuple[int, ...] | None], what: str, where: str
) -> None:
    plan = compiled(folder, 2)
    other = write_checkpoint(tmp_path / "other", changed(shapes))
    faults = check_checkpoint(plan, other)
    assert [(fault.where, what in fault.what) for fault in faults] == [(where, True)]
    with pytest.raises(MismatchError):
        presplit(plan, other, tmp_path / "shards")
    if "know" not in what:
        with pytest.raises(MismatchError) as caught:
            weights.open_weights(other, plan)
        assert [fault.where for fault in caught.value.faults] == [where]


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = compiled(folder, 2)
    source = weights.open_weights(folder, plan)
    (folder / "1.safetensors").write_bytes((folder / "1.safetensors").read_bytes()[:-4])

    def read_all() -> None:
        for weight in source.of_rank(1):
            read_weights.read_weight(weight, torch.device("cpu"), None)

    with pytest.raises(CheckpointError, match=r"1\.safetensors ended"):
        read_all()
    CASE.write(folder)
    monkeypatch.setattr("os.preadv", lambda *_: 0)
    with pytest.raises(OutputError, match="it changed while it was read"):
        presplit(plan, folder, tmp_path / "shards")


def hostile(plan: Plan, name: str, **changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(plan.to_json())
    entry = next(entry for entry in data["parameters"] if entry["name"] == name)
    entry.update(changes)
    return data


def faults_of(data: dict[str, Any]) -> list[str]:
    data["fingerprint"] = documents.fingerprint({key: value for key, value in data.items() if key != "fingerprint"})
    with pytest.raises(DocumentError) as caught:
        Plan.from_dict(data)
    return [f"{fault.where}: {fault.expected}" for fault in caught.value.faults]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sources": {"names": ["l.{0..1}.moe.*.w2"], "count": 4}}, ".count: dimension 0"),
        ({"sources": {"names": ["l.{0..1}.moe.*.w2"], "count": 1_000_000}}, ": at most 1000000 tensors"),
        ({"sources": {"names": ["l.{0..1}.moe.*.w2"], "count": 1_000_001}}, ".count: "),
        ({"sources": {"names": ["l.{0..1}.moe.*.w2"], "count": 0}}, ".count: "),
        ({"sources": {"names": ["l.{0..1}.moe.*.w2"], "count": True}}, ".count: "),
        ({"sources": {"names": ["l.{0..1}.w2"], "count": 3}}, ": one * in each name"),
        ({"sources": {"names": ["l.{0..1}.*.w2.*"], "count": 3}}, ": one * in each name"),
        ({"sources": {"names": ["l.{0..1}.*.w2", "l.{0..1}.w3"], "count": 3}}, ": one * in each name"),
        ({"sources": {"names": ["l.{0..2}.moe.*.w2"], "count": 3}}, ".names[0]: as many names"),
        ({"sources": {"names": ["l.{0..9}{0..99999}.*.w2"], "count": 3}}, ".names[0]: as many names"),
        ({"sources": {"names": ["l.{0..1}.moe.*.w2"], "count": 3}, "source": "l.{0..1}.x"}, ": either source or"),
        ({"sources": {"names": [], "count": 3}}, ".names: "),
        ({"sources": {"count": 3}}, ": \"names\""),
        ({"sources": {"names": ["l.{0..1}.moe.*.w2"], "count": 3, "dim": 1}}, ".dim: "),
    ],
)  # fmt: skip
def test_plans_with_impossible_sources_are_refused(folder: Path, changes: dict[str, Any], fault: str) -> None:
    plan = compiled(folder, 2)
    index = next(at for at, entry in enumerate(plan.parameters) if entry.name == "l.{0..1}.experts.down")
    found = faults_of(hostile(plan, "l.{0..1}.experts.down", **changes))
    assert any(line.startswith(f"parameters[{index}].sources{fault}") for line in found), found


def test_many_hostile_names_are_not_expanded(folder: Path) -> None:
    names = [f"x{n}.{{0..999}}{{0..999}}.*" for n in range(10_000)]
    found = faults_of(hostile(compiled(folder, 2), "whole", sources={"names": names}))
    assert len(found) == 101, "that of the fingerprint, and the first hundred that contradict each other"


def test_names_on_disk() -> None:
    known: Any = {"layout": "l", "dtype": "F32", "style": "replicated", "rule": "r"}
    assert Parameter(name="a", **known).names_on_disk() == ("a",)
    assert Parameter(name="a", source="b", **known).names_on_disk() == ("b",)
    sources = Sources(names=("e.*.w1", "e.*.w3"), count=2)
    assert Parameter(name="a", sources=sources, **known).names_on_disk() == ("e.0.w1", "e.0.w3", "e.1.w1", "e.1.w3")
    assert Parameter(name="a", sources=Sources(names=("q", "k")), **known).names_on_disk() == ("q", "k")
    braces = Sources(names=("{0..1}.e.*", "{2..3}.f.*"), count=5)
    assert [one.names for one in braces.expanded()] == [("0.e.*", "2.f.*"), ("1.e.*", "3.f.*")]


def test_a_plan_of_a_large_mixture_is_small(tmp_path: Path) -> None:
    """DeepSeek-V3's shape: 61 layers, 256 experts in all but three of them, 163 files."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(61):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.self_attn.o_proj.weight"] = ("BF16", (7168, 16384))
        for expert in range(256 if layer > 2 else 0):
            for leaf, shape in (("gate", (2048, 7168)), ("up", (2048, 7168)), ("down", (7168, 2048))):
                tensors[f"{prefix}.mlp.experts.{expert}.{leaf}_proj.weight"] = ("BF16", shape)
    write_sparse_checkpoint(tmp_path, {}, tensors, 163)
    spec = SpecFile.from_dict(
        {
            "assembled_tensors": {
                "model.layers.*.mlp.experts.gate_up_proj": [
                    "model.layers.*.mlp.experts.*.gate_proj.weight",
                    "model.layers.*.mlp.experts.*.up_proj.weight",
                ],
                "model.layers.*.mlp.experts.down_proj": ["model.layers.*.mlp.experts.*.down_proj.weight"],
            },
            "layer_specs": [{"patterns": [".*"], "partition_type": "skip"}],
        }
    )
    plan = compile_plan(tmp_path, tp_size=8, preset="none", specs=[spec])
    assert [(entry.name, plan.shape_of(entry)) for entry in plan.parameters] == [
        ("model.layers.{0..60}.self_attn.o_proj.weight", (7168, 16384)),
        ("model.layers.{3..60}.mlp.experts.down_proj", (256, 7168, 2048)),
        ("model.layers.{3..60}.mlp.experts.gate_up_proj", (256, 4096, 7168)),
    ]
    assert len(plan.to_json()) < 4096
    assert check_checkpoint(plan, tmp_path) == []


def test_an_error_names_all_that_is_wrong(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {**{n: s for n, s in SHAPES.items() if n != "part.b"}, "l.0.moe.1.w1": (4, 3)})
    with pytest.raises(AutoTPError) as caught:
        compiled(tmp_path, 2)
    assert [fault.what for fault in caught.value.faults] == [UNLIKE, LACKS]
