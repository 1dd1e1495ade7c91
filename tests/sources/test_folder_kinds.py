"""Of every kind of folder the weights are those of `from_pretrained`, bit for bit, or it is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from autotp_plan.planner import Plan, check_checkpoint, check_shards, compile_plan, convert, merge, presplit, reshard
from autotp_plan.planner.cli.main import main
from autotp_plan.schemas.errors import AutoTPError, CheckpointError, OutputError
from autotp_plan.schemas.shards.origin import fingerprint_of
from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.files import Reader
from autotp_plan.sources.model_folder import open_checkpoint
from tests.helpers.launch import launch
from tests.helpers.models import load_dense, save_checkpoint
from tests.runtime.loading.test_tied_with_another_head import store_a_head
from tests.test_architecture import HEAVY, python

Tensors = dict[str, torch.Tensor]
SIDE_FILES = {"config.json", "generation_config.json"}


def tensors_in(folder: Path) -> Tensors:
    """The state dict of a folder of safetensors files."""
    from safetensors.torch import load_file

    return {
        name: value for file in sorted(folder.glob("model*.safetensors")) for name, value in load_file(file).items()
    }


def write_bin(folder: Path, tensors: Tensors, files: int = 1, name: str = "pytorch_model") -> None:
    """`.bin` files as transformers wrote them."""
    if files == 1:
        torch.save(tensors, folder / f"{name}.bin")
        return
    weight_map = {key: f"{name}-{at % files + 1:05d}-of-{files:05d}.bin" for at, key in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({key: value for key, value in tensors.items() if weight_map[key] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{name}.bin.index.json").write_text(json.dumps(index))


def copy(source: Path, folder: Path, *names: str) -> Path:
    """`folder` with the config of `source` and the files whose names match."""
    folder.mkdir(exist_ok=True)
    for name in (*SIDE_FILES, *names):
        for path in source.glob(name):
            shutil.copy(path, folder)
    return folder


def trained_further(tensors: Tensors) -> Tensors:
    return {name: value + 1 for name, value in tensors.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`many` and `one`: a model in several files, and another of the same shapes in one."""
    work = tmp_path_factory.mktemp("sources")
    save_checkpoint(work / "many", "llama")
    dense: Any = load_dense(work / "many")
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(2)
    dense.save_pretrained(work / "one")
    save_checkpoint(work / "tied", "llama_bias_tied")
    return work


def read_all(folder: Path) -> Tensors:
    """The tensors that we read, by name."""
    from autotp_plan.runtime.loading.weights import DTYPES

    found = {}
    with Reader() as reader:
        for name, entry in open_checkpoint(folder).tensors.items():
            data = bytearray(entry.stop - entry.start)
            reader.read_into(memoryview(data), ByteRanges.of([entry]).ranges)
            found[name] = torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)
    return found


def compare(folder: Path) -> None:
    """What we read is what `from_pretrained` reads."""
    dense: Any = load_dense(folder, "auto")
    expected = dense.state_dict()
    found = read_all(folder)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
    assert expected.keys() - found.keys() <= {"lm_head.weight"}


KINDS: dict[str, Callable[[Path, Path], None]] = {}


def kind(function: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    KINDS[function.__name__] = function
    return function


@kind
def one_bin_file(work: Path, folder: Path) -> None:
    write_bin(copy(work / "many", folder), tensors_in(work / "many"))


@kind
def several_bin_files(work: Path, folder: Path) -> None:
    write_bin(copy(work / "many", folder), tensors_in(work / "many"), files=3)


@kind
def bin_files_with_views(work: Path, folder: Path) -> None:
    """Matrices that are stored transposed."""
    tensors = {
        key: value.t().contiguous().t() if value.ndim == 2 else value
        for key, value in tensors_in(work / "many").items()
    }
    write_bin(copy(work / "many", folder), tensors, files=2)


@kind
def a_bin_file_and_a_bin_index(work: Path, folder: Path) -> None:
    several_bin_files(work, folder)
    write_bin(folder, trained_further(tensors_in(work / "many")))


@kind
def a_tied_bin_file_with_its_head(work: Path, folder: Path) -> None:
    tensors = tensors_in(work / "tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_bin(copy(work / "tied", folder), tensors)


@kind
def a_tied_bin_file_with_another_head(work: Path, folder: Path) -> None:
    tensors = tensors_in(work / "tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1e-3
    write_bin(copy(work / "tied", folder), tensors, files=2)


@kind
def a_tied_safetensors_file_with_another_head(work: Path, folder: Path) -> None:
    dense: Any = load_dense(work / "tied")
    dense.save_pretrained(folder)
    store_a_head(folder, equal=False)


@kind
def an_index_and_one_file(work: Path, folder: Path) -> None:
    copy(work / "many", folder, "*.safetensors", "*.json")
    copy(work / "one", folder, "model.safetensors")


@kind
def safetensors_and_bin(work: Path, folder: Path) -> None:
    copy(work / "one", folder, "model.safetensors")
    write_bin(folder, tensors_in(work / "many"))


@kind
def an_index_and_bin(work: Path, folder: Path) -> None:
    copy(work / "many", folder, "*.safetensors", "*.json")
    write_bin(folder, trained_further(tensors_in(work / "many")))


@kind
def consolidated_too(work: Path, folder: Path) -> None:
    copy(work / "many", folder, "*.safetensors", "*.json")
    shutil.copy(work / "one" / "model.safetensors", folder / "consolidated.safetensors")


@kind
def a_variant_too(work: Path, folder: Path) -> None:
    copy(work / "many", folder, "*.safetensors", "*.json")
    shutil.copy(work / "one" / "model.safetensors", folder / "model.fp16.safetensors")


@kind
def a_file_that_the_index_does_not_name(work: Path, folder: Path) -> None:
    copy(work / "many", folder, "*.safetensors", "*.json")
    shutil.copy(work / "one" / "model.safetensors", folder / "model-00009-of-00009.safetensors")


@kind
def a_bin_file_that_the_index_does_not_name(work: Path, folder: Path) -> None:
    several_bin_files(work, folder)
    torch.save(trained_further(tensors_in(work / "many")), folder / "pytorch_model-00009-of-00009.bin")


AMBIGUOUS = {
    "a_bin_file_and_a_bin_index": "pytorch_model.bin",
    "an_index_and_one_file": "model.safetensors",
    "safetensors_and_bin": "model.safetensors",
    "an_index_and_bin": "model.safetensors.index.json",
    "consolidated_too": "model.safetensors.index.json",
    "a_variant_too": "model.safetensors.index.json",
    "a_file_that_the_index_does_not_name": "model.safetensors.index.json",
    "a_bin_file_that_the_index_does_not_name": "pytorch_model.bin.index.json",
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_read_is_what_from_pretrained_reads(sources: Path, tmp_path: Path, name: str) -> None:
    """Also after presplit and merge; and a plan says which weights were not read."""
    KINDS[name](sources, tmp_path / "model")
    compare(tmp_path / "model")
    plan = compile_plan(tmp_path / "model", tp_size=2)
    assert check_checkpoint(plan, tmp_path / "model") == []
    notes = [note for note in plan.notes if "from_pretrained" in note]
    assert [note.split()[5].rstrip(",") for note in notes] == ([AMBIGUOUS[name]] if name in AMBIGUOUS else []), notes
    presplit(plan, tmp_path / "model", tmp_path / "shards")
    check_shards(tmp_path / "shards")
    merge(tmp_path / "shards", tmp_path / "merged")
    compare(tmp_path / "merged")
    before, after = read_all(tmp_path / "model"), read_all(tmp_path / "merged")
    assert before.keys() == after.keys() and all(torch.equal(before[one], after[one]) for one in before)
    assert not [path.name for path in (tmp_path / "merged").iterdir() if path.suffix == ".bin"]


def test_a_wrong_choice_would_be_found(sources: Path, tmp_path: Path) -> None:
    """Planted: the weights of the index, where from_pretrained reads the one file."""
    an_index_and_one_file(sources, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "aside")
    chosen = read_all(tmp_path / "model")
    (tmp_path / "aside").rename(tmp_path / "model" / "model.safetensors")
    dense: Any = load_dense(tmp_path / "model", "auto")
    assert not any(torch.equal(value, chosen[name]) for name, value in dense.state_dict().items())


def test_tensors_of_a_named_file_that_the_index_does_not_name(sources: Path, tmp_path: Path) -> None:
    """from_pretrained reads them; we refuse, for either kind of file."""
    several_bin_files(sources, tmp_path / "bin")
    copy(sources / "many", tmp_path / "safe", "*.safetensors", "*.json")
    for folder, index_name in (("bin", "pytorch_model.bin.index.json"), ("safe", "model.safetensors.index.json")):
        path = tmp_path / folder / index_name
        index = json.loads(path.read_text())
        del index["weight_map"]["model.norm.weight"]
        path.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight, which the index does not name"):
            open_checkpoint(tmp_path / folder)


@pytest.mark.parametrize("wrong", ["missing file", "wrong file", "missing tensor", "outside"])
def test_a_bin_index_that_is_wrong(sources: Path, tmp_path: Path, wrong: str) -> None:
    several_bin_files(sources, tmp_path)
    path = tmp_path / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    if wrong == "missing file":
        (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    elif wrong == "wrong file":
        index["weight_map"]["model.norm.weight"] = next(
            name for name in index["weight_map"].values() if name != index["weight_map"]["model.norm.weight"]
        )
    elif wrong == "missing tensor":
        index["weight_map"]["model.more.weight"] = index["weight_map"]["model.norm.weight"]
    else:
        index["weight_map"]["model.norm.weight"] = "../pytorch_model.bin"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    code = "broken-torch-file" if wrong == "missing file" else "index-differs"
    assert {fault.code for fault in caught.value.faults} == {code}


@pytest.mark.parametrize("files", [1, 3])
def test_convert_writes_what_every_command_reads(sources: Path, tmp_path: Path, files: int) -> None:
    """Shards of the `.bin` files and of the converted folder are the same, to the byte, and so is what merge writes."""
    folder = copy(sources / "many", tmp_path / "model")
    write_bin(folder, tensors_in(sources / "many"), files)
    (folder / "tokenizer.json").write_text("{}")
    size = convert(folder, tmp_path / "converted")
    names = {path.name for path in (tmp_path / "converted").iterdir()}
    weights = {"model.safetensors"} if files == 1 else {f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)}
    assert names == weights | SIDE_FILES | {"tokenizer.json"} | (
        {"model.safetensors.index.json"} if files > 1 else set()
    )
    assert size == sum(path.stat().st_size for path in (tmp_path / "converted").iterdir())
    compare(tmp_path / "converted")
    assert fingerprint_of(open_checkpoint(folder)) == fingerprint_of(open_checkpoint(tmp_path / "converted"))
    assert convert(folder, tmp_path / "converted") == size, "it is finished"
    plan = compile_plan(folder, tp_size=2)
    assert plan.to_json() == compile_plan(tmp_path / "converted", tp_size=2).to_json()
    for name in ("model", "converted"):
        presplit(plan, tmp_path / name, tmp_path / f"{name}.shards")
    merge(tmp_path / "model.shards", tmp_path / "merged")
    reshard(tmp_path / "model.shards", tmp_path / "of4", tp_size=4)
    for one, other in (("model.shards", "converted.shards"), ("converted", "merged")):
        first, second = ({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in (one, other))
        assert first == second


def test_convert_goes_on_where_it_was_stopped(sources: Path, tmp_path: Path) -> None:
    several_bin_files(sources, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "undisturbed")
    stops = 0

    def stop(done: int, total: int) -> None:
        nonlocal stops
        if done > total * 0.9 and stops < 1:
            stops += 1
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        convert(tmp_path / "model", tmp_path / "out", workers=1, progress=stop)
    with pytest.raises(AutoTPError):
        open_checkpoint(tmp_path / "out")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("model*.safetensors")}
    assert 0 < len(kept) < 3
    convert(tmp_path / "model", tmp_path / "out", workers=1)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == when for name, when in kept.items())
    for path in (tmp_path / "undisturbed").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_the_commands(sources: Path, tmp_path: Path) -> None:
    """compile, check, presplit, merge and convert of .bin files; merge says what it writes."""
    several_bin_files(sources, tmp_path / "model")
    lines = (
        f"compile --model {tmp_path}/model --tp 2 -o {tmp_path}/plan.json",
        f"check {tmp_path}/plan.json --checkpoint {tmp_path}/model",
        f"presplit {tmp_path}/plan.json --checkpoint {tmp_path}/model -o {tmp_path}/shards",
        f"merge {tmp_path}/shards -o {tmp_path}/merged",
        f"convert {tmp_path}/model -o {tmp_path}/converted",
    )
    said = []
    for line in lines:
        result = CliRunner().invoke(main, line.split())
        assert result.exit_code == 0, result.output
        said.append(result.output)
    original = "pytorch_model-00001-of-00003.bin, pytorch_model-00002-of-00003.bin and 1 more"
    assert f"merged: written as safetensors; the original was {original}" in said[3]
    assert "converted: safetensors, " in said[4]
    assert CliRunner().invoke(main, ["merge", f"{tmp_path}/shards", "-o", f"{tmp_path}/quiet", "--quiet"]).output == ""


def test_no_command_needs_torch(sources: Path, tmp_path: Path) -> None:
    bin_files_with_views(sources, tmp_path / "model")
    code = """
import sys
from autotp_plan.planner.cli.main import main
folder, work = sys.argv[1:]
for arguments in (["compile", "--model", folder, "--tp", "2", "-o", work + "/plan.json"],
                  ["presplit", work + "/plan.json", "--checkpoint", folder, "-o", work + "/shards"],
                  ["convert", folder, "-o", work + "/converted"]):
    main(arguments, standalone_mode=False)
print(*{name.split('.')[0] for name in sys.modules})
"""
    loaded = python(code, tmp_path / "model", tmp_path).splitlines()[-1].split()
    assert "autotp_plan" in loaded and not (HEAVY - {"numpy"}) & set(loaded)
    compare(tmp_path / "converted")


def test_a_bare_config_beside_weights_that_are_not_read(sources: Path, tmp_path: Path) -> None:
    copy(sources / "one", tmp_path / "model")
    shutil.copy(sources / "one" / "model.safetensors", tmp_path / "model" / "model.fp16.safetensors")
    plan = compile_plan(tmp_path / "model", tp_size=2)
    assert "The plan is made from config.json alone. Not read: model.fp16.safetensors." in plan.notes
    with pytest.raises(CheckpointError, match="the only weights in this folder are of a variant"):
        check_checkpoint(plan, tmp_path / "model")


def test_what_else_lies_in_a_folder_is_not_in_the_fingerprint(sources: Path, tmp_path: Path) -> None:
    """Shards by a plan of one folder are those by a plan of another with the same model, as version 0.1 wrote it."""
    copy(sources / "one", tmp_path / "alone", "model.safetensors")
    copy(sources / "one", tmp_path / "beside", "model.safetensors")
    write_bin(tmp_path / "beside", {"other": torch.ones(2)})
    alone, beside = (compile_plan(tmp_path / name, tp_size=2) for name in ("alone", "beside"))
    (note,) = set(beside.notes) - set(alone.notes)
    assert note.endswith(" Not read: pytorch_model.bin.")
    assert beside.fingerprint == alone.fingerprint
    (tmp_path / "plan.json").write_text(beside.to_json())
    assert Plan.read(tmp_path / "plan.json") == beside
    presplit(alone, tmp_path / "alone", tmp_path / "shards")
    assert check_shards(tmp_path / "shards").plan.fingerprint == beside.fingerprint
    for notes in (("Another note.",), ("Another note.", note)):
        changed = dataclasses.replace(alone, notes=notes)
        assert changed.fingerprint != alone.fingerprint
        assert changed.fingerprint == dataclasses.replace(alone, notes=("Another note.",)).fingerprint


def loaded(work: Path) -> dict[str, list[str]]:
    """Inside a rank: differences between what load_model makes and `from_pretrained`, and planted ones."""
    from autotp_plan.runtime import load_plan
    from tests.runtime.loading.test_equals_from_pretrained import differences

    found = {}
    for name in ("several_bin_files", "bin_files_with_views", "a_tied_bin_file_with_its_head", "an_index_and_one_file",
                 "a_tied_bin_file_with_another_head"):  # fmt: skip
        plan = load_plan(work / f"{name}.json")
        for dtype in ("float32", "bfloat16"):
            kind = getattr(torch, dtype)
            model = plan.load_model(work / name, dtype=kind)
            found[f"{name} {dtype}"] = differences(model, load_dense(work / name, kind), plan)
    plan = load_plan(work / "several_bin_files.json")
    model = plan.load_model(work / "several_bin_files", dtype=torch.float32)
    found["planted"] = differences(model, load_dense(work / "an_index_and_one_file"), plan)
    return found


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_loaded_models_are_those_of_from_pretrained(sources: Path, tmp_path: Path) -> None:
    for name, make in KINDS.items():
        make(sources, tmp_path / name)
        (tmp_path / f"{name}.json").write_text(compile_plan(tmp_path / name, tp_size=2).to_json())
    for found in launch(loaded, 2, tmp_path):
        assert len(found.pop("planted")) > 10
        assert len(found) == 10 and {name: value for name, value in found.items() if value} == {}
