"""Quantised checkpoints from compile to merge: shards and the merged checkpoint are those of the bf16 weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from autotp_plan.planner.cli.main import main
from autotp_plan.planner.compiler import compile_plan
from autotp_plan.planner.shards.merge import check_shards, merge
from autotp_plan.planner.shards.presplit import presplit
from autotp_plan.planner.shards.reshard import reshard
from autotp_plan.schemas.errors import AutoTPError, CheckpointError, MismatchError, OptionError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.folder import read_shards
from autotp_plan.sources.check_checkpoint import check_checkpoint
from tests.dequantize.test_values import DEEPSEEK, INT4, MISTRAL, compressed
from tests.helpers import quantized
from tests.helpers.checkpoints import LLAMA_CONFIG, llama_shapes
from tests.helpers.quantized import Made, Quantized, Weights

LLAMA = {
    **LLAMA_CONFIG, "hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_attention_heads": 8,
    "num_key_value_heads": 8, "dtype": "bfloat16",
}  # fmt: skip
PROJECTIONS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_proj.weight", "up_proj.weight")


def fp8(name: str, shape: tuple[int, ...], seed: int) -> Made | None:
    """As DeepSeek: the projections of all layers; blocks are cut by most ranks' shares."""
    if not name.endswith((*PROJECTIONS, "down_proj.weight")):
        return None
    return quantized.fp8(name, shape, seed, (48, 40))


def int4(name: str, shape: tuple[int, ...], seed: int) -> Made | None:
    if not name.endswith((*PROJECTIONS, "down_proj.weight")):
        return None
    return quantized.int4(name, (shape[0], shape[1]), seed)


def mistral(name: str, shape: tuple[int, ...], seed: int) -> Made | None:
    if not name.endswith(PROJECTIONS):
        return None
    made = quantized.fp8(name, shape, seed, (shape[0], shape[1]), scale_shape=())
    made.tensors[name.removesuffix("weight") + "activation_scale"] = torch.tensor(2.0)
    return made


def rows(name: str, shape: tuple[int, ...], seed: int) -> Made | None:
    if not name.endswith(PROJECTIONS):
        return None
    made = quantized.fp8(name, shape, seed, (1, shape[1]), "{}_scale", scale_dtype=torch.bfloat16)
    if name.endswith("k_proj.weight"):  # of a cache in fp8
        made.tensors[name.replace("k_proj.weight", "k_scale")] = torch.tensor([2.0])
    return made


FORMATS = {
    "fp8": ({**DEEPSEEK, "weight_block_size": [48, 40]}, fp8),
    "int4": (INT4, int4),
    "mistral": (MISTRAL, mistral),
    "rows": (compressed(), rows),
}


def written(folder: Path, kind: str = "fp8", **changes: Any) -> Quantized:
    settings, make = FORMATS[kind]
    config = {**LLAMA, "quantization_config": settings, **changes}
    return quantized.write(folder, llama_shapes(LLAMA), config, make)


def merged(folder: Path) -> Weights:
    found: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def same(found: Weights, wanted: Weights) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", FORMATS)
def test_merge_gives_the_checkpoint_in_bf16(tmp_path: Path, kind: str) -> None:
    """It loads as one that was never quantised; what it says of itself fits."""
    made = written(tmp_path / "model", kind)
    plan = compile_plan(made.folder, tp_size=2)
    assert {entry.dtype for entry in plan.parameters} == {"BF16"}
    assert plan.dequantize is not None
    assert plan.dequantize.method == FORMATS[kind][0]["quant_method"]
    assert "quantization_config" not in (plan.model.config or {})
    assert Plan.from_dict(json.loads(plan.to_json())) == plan
    assert check_checkpoint(plan, made.folder) == []
    presplit(plan, made.folder, tmp_path / "shards")
    check_shards(tmp_path / "shards")
    merge(tmp_path / "shards", tmp_path / "merged")
    assert same(merged(tmp_path / "merged"), made.plain)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config == LLAMA
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == made.plain.keys()
    assert index["metadata"]["total_size"] == sum(2 * one.numel() for one in made.plain.values())
    again = compile_plan(tmp_path / "merged", tp_size=2)
    assert again.dequantize is None
    assert (again.parameters, again.model) == (plan.parameters, plan.model)
    assert check_checkpoint(plan, tmp_path / "merged") == []


@pytest.mark.parametrize("tp_size", range(1, 9))
@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_shards_are_those_of_the_bf16_weights(tmp_path: Path, kind: str, tp_size: int) -> None:
    """At every TP size, where shares end inside of blocks too: every rank's tensors, sliced here by the plan."""
    made = written(tmp_path / "model", kind)
    plan = compile_plan(made.folder, tp_size=tp_size, uneven=True)
    presplit(plan, made.folder, tmp_path / "shards", workers=2)
    shards = read_shards(tmp_path / "shards")
    files = {path: load_file(path) for path in sorted((tmp_path / "shards").glob("*.safetensors"))}
    for parameter in plan.expanded():
        layout = plan.layouts[parameter.layout]
        full = made.plain[parameter.names_on_disk()[0]]
        for rank in range(tp_size):
            entry = shards.tensors[parameter.name, rank]
            assert isinstance(entry.file, Path)
            wanted = full
            if layout.dim is not None:
                parts = [full.narrow(layout.dim, start, stop - start) for start, stop in layout.intervals[rank]]
                wanted = torch.cat(parts, layout.dim)
            assert torch.equal(files[entry.file][entry.name], wanted), (parameter.name, rank)


def test_parts_make_the_same_shards(tmp_path: Path) -> None:
    made = written(tmp_path / "model")
    plan = compile_plan(made.folder, tp_size=4)
    options: dict[str, Any] = {"max_file_bytes": 30_000}
    presplit(plan, made.folder, tmp_path / "at once", **options)
    for part in (3, 1, 2):
        presplit(plan, made.folder, tmp_path / "parts", part=(part, 3), **options)
    for path in sorted((tmp_path / "at once").iterdir()):
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes(), path.name


def test_reshard_and_other_dtypes(tmp_path: Path) -> None:
    made = written(tmp_path / "model")
    presplit(compile_plan(made.folder, tp_size=2), made.folder, tmp_path / "two")
    reshard(tmp_path / "two", tmp_path / "four", tp_size=4)
    presplit(compile_plan(made.folder, tp_size=4), made.folder, tmp_path / "fresh")
    for path in sorted((tmp_path / "fresh").iterdir()):
        assert (tmp_path / "four" / path.name).read_bytes() == path.read_bytes(), path.name
    plan = compile_plan(made.folder, tp_size=2, dtype="F32")
    assert {entry.dtype for entry in plan.parameters if entry.name.endswith("q_proj.weight")} == {"F32"}
    assert {entry.dtype for entry in plan.parameters if entry.name.endswith("norm.weight")} == {"BF16"}
    assert check_checkpoint(plan, made.folder) == []
    presplit(plan, made.folder, tmp_path / "f32")
    merge(tmp_path / "f32", tmp_path / "merged")
    found = merged(tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert found[name].dtype == torch.float32
    assert torch.equal(found[name].bfloat16(), made.plain[name])
    assert not torch.equal(found[name], made.plain[name].float())


def test_what_the_commands_say(tmp_path: Path) -> None:
    made = written(tmp_path / "model")
    plan, shards = str(tmp_path / "plan.json"), str(tmp_path / "shards")

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(main, list(arguments))
        assert done.exit_code == 0, done.output
        return done.output

    said = "weights of fp8 in blocks of 48 x 40, which become BF16"
    assert said in run("compile", "--model", str(made.folder), "--tp", "2", "-o", plan, "--dtype", "BF16")
    assert "weights of fp8 in blocks of 48 x 40, which become BF16" in run("show", plan)
    assert "holds what it says" in run("check", plan, "--checkpoint", str(made.folder))
    run("presplit", plan, "--checkpoint", str(made.folder), "-o", shards)
    assert "sound" in run("check", shards)
    assert "every byte is that of" in run("check", shards, "--checkpoint", str(made.folder))
    assert "written in BF16; the original's weights are fp8" in run("merge", shards, "-o", str(tmp_path / "m"))


def test_a_bare_config_is_planned_as_the_checkpoint(tmp_path: Path) -> None:
    made = written(tmp_path / "model")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((made.folder / "config.json").read_bytes())
    plan = compile_plan(bare, tp_size=2)
    whole = compile_plan(made.folder, tp_size=2)
    assert (plan.parameters, plan.model, plan.dequantize) == (whole.parameters, whole.model, whole.dequantize)
    presplit(plan, made.folder, tmp_path / "shards")
    with pytest.raises(OptionError, match="--dtype"):
        compile_plan(bare, tp_size=2, dtype="F32")


def without(folder: Path, ending: str) -> None:
    """Take the first tensor with a name that ends so out of a checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = min(name for name in index["weight_map"] if name.endswith(ending))
    path = folder / index["weight_map"].pop(name)
    tensors = load_file(path)
    del tensors[name]
    quantized.write_file(path, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        compile_plan(folder, tp_size=2)
    assert all(fault.next for fault in caught.value.faults)
    return str(caught.value)


def test_what_is_missing_or_does_not_fit_is_said(tmp_path: Path) -> None:
    made = written(tmp_path / "missing")
    without(made.folder, "_scale_inv")
    assert "a quantised weight has no scale" in refusal(made.folder)
    made = written(tmp_path / "codes")
    without(made.folder, "q_proj.weight")
    assert "no codes that belong to it" in refusal(made.folder)
    settings = {**FORMATS["fp8"][0], "weight_block_size": [64, 40]}
    made = written(tmp_path / "block", quantization_config=settings)
    assert "the scales of a quantised weight do not fit its codes" in refusal(made.folder)
    made = written(tmp_path / "no config", quantization_config=None)
    assert "no quantization_config in config.json" in refusal(made.folder)
    plan = compile_plan(written(tmp_path / "model").folder, tp_size=2)
    with pytest.raises(MismatchError):
        other = quantized.write(
            tmp_path / "other", llama_shapes({**LLAMA, "vocab_size": 128}), LLAMA, lambda *one: None
        )
        presplit(plan, other.folder, tmp_path / "shards")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"), ({"quant_method": "modelopt"}, "modelopt"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"), ({}, "unknown method"), (3, "unknown method"),
        (compressed(num_bits=4), "4-bit float"), (compressed(num_bits=8, type="int"), "8-bit int"),
        (compressed(num_bits=4, type="int", symmetric=False), "zero points"),
        (compressed(num_bits=4, type="int", actorder="group"), "actorder"),
        ({"quant_method": "compressed-tensors"}, "no weights"), ({**INT4, "format": "marlin-24"}, "marlin-24"),
        ({**INT4, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ],
    ids=str,
)  # fmt: skip
def test_other_formats_are_refused_by_name(tmp_path: Path, settings: Any, said: str) -> None:
    made = written(tmp_path / "model", quantization_config=settings)
    if not settings:
        (made.folder / "hf_quant_config.json").write_text("{}")
        said = "ModelOpt"
    assert said in refusal(made.folder)


def test_what_is_advised_works(tmp_path: Path) -> None:
    """A refusal says to give the checkpoint in bf16, or in a format that is understood."""
    made = written(tmp_path / "model", quantization_config={"quant_method": "gptq"})
    text = refusal(made.folder)
    assert "in bf16" in text
    compile_plan(written(tmp_path / "fp8").folder, tp_size=2)
    plain = quantized.write(tmp_path / "plain", llama_shapes(LLAMA), LLAMA, lambda *one: None)
    compile_plan(plain.folder, tp_size=2)


def test_a_config_left_behind_does_not_matter(tmp_path: Path) -> None:
    """People dequantise a model and leave `quantization_config` in config.json."""
    config = {**LLAMA, "quantization_config": DEEPSEEK}
    plain = quantized.write(tmp_path / "plain", llama_shapes(LLAMA), config, lambda *one: None)
    plan = compile_plan(plain.folder, tp_size=2)
    assert plan.dequantize is None
    presplit(plan, plain.folder, tmp_path / "shards")
    merge(tmp_path / "shards", tmp_path / "merged")
    assert same(merged(tmp_path / "merged"), plain.plain)
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())


def test_zero_points_and_other_shapes_are_refused(tmp_path: Path) -> None:
    made = written(tmp_path / "model", "int4")
    path = sorted(made.folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("_packed"))
    stem = name.removesuffix("_packed")
    for added, said in (("_zero_point", "zero points"), ("_g_idx", "g_idx")):
        index = json.loads((made.folder / "model.safetensors.index.json").read_text())
        folder = tmp_path / added
        quantized.write_tensors(folder, {}, json.loads((made.folder / "config.json").read_text()))
        for one in made.folder.glob("*.safetensors"):
            (folder / one.name).write_bytes(one.read_bytes())
        quantized.write_file(folder / path.name, {**tensors, stem + added: torch.zeros(1, dtype=torch.int32)})
        index["weight_map"][stem + added] = path.name
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert said in refusal(folder)
    shapes = {name: stated + 8 for name, stated in tensors.items() if name.endswith("_shape")}
    quantized.write_file(path, {**tensors, **shapes})
    plan = compile_plan(made.folder, tp_size=2)
    with pytest.raises(AutoTPError, match="is said to have another shape"):
        presplit(plan, made.folder, tmp_path / "shards")


def test_without_numpy_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(tmp_path / "model")
    plan = compile_plan(made.folder, tp_size=2)
    monkeypatch.setitem(__import__("sys").modules, "autotp_plan.dequantize.weight_reader", None)
    with pytest.raises(AutoTPError, match=r"autotp-plan\[fast\]"):
        presplit(plan, made.folder, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("one_scale", [False, True])
def test_memory_does_not_grow_with_the_weight(tmp_path: Path, one_scale: bool) -> None:
    """A weight of 64 MB is computed in pieces."""
    import tracemalloc

    shape = (8192, 4096)
    codes = torch.zeros(shape, dtype=torch.float8_e4m3fn)
    tensors = {"a.weight": codes, "a.weight_scale_inv": torch.tensor(1.0) if one_scale else torch.ones(64, 32)}
    quantized.write_tensors(tmp_path, tensors, {"quantization_config": DEEPSEEK})
    from autotp_plan.schemas.storage.files import Reader, Span
    from autotp_plan.sources.model_folder import open_checkpoint

    entry = open_checkpoint(tmp_path).tensors["a.weight"]
    assert not isinstance(entry.file, Path)
    target = bytearray(2 * math.prod(shape))
    with Reader() as reader:
        entry.file.read_into(memoryview(target)[:2], [Span(entry.start, 2)], reader)
        tracemalloc.start()
        entry.file.read_into(memoryview(target), [Span(entry.start, len(target))], reader)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
