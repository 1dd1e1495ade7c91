"""presplit finds every byte of a quantised checkpoint that is not what the hub has a SHA-256 of, while it streams."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner

from autotp_plan.planner import Plan, compile_plan, presplit
from autotp_plan.planner.cli.main import main
from autotp_plan.planner.copying import source_hash
from autotp_plan.schemas.errors import CheckpointError
from autotp_plan.schemas.storage.safetensors_header import read_header
from autotp_plan.sources.model_folder import ModelFolder
from tests.dequantize.test_checkpoints import FORMATS, LLAMA, written
from tests.helpers import quantized
from tests.helpers.checkpoints import llama_shapes
from tests.helpers.hub_client import loopback_hub
from tests.helpers.hub_server import HubServer, Repository, Trouble, folder_files
from tests.helpers.quantized import Weights, write_file
from tests.sources.test_checksums import Unsteady, again, fault_of, flipped
from tests.sources.test_hub_presplit import same_files

FILE_BYTES = 400_000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with loopback_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


def as_published(folder: Path, num_files: int = 1) -> Path:
    """The tensors of a checkpoint in files in the order in which safetensors writes them: the longest items first."""
    tensors: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        from safetensors.torch import load_file

        tensors.update(load_file(path))
        path.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(num_files):
        part = names[len(names) * number // num_files : len(names) * (number + 1) // num_files]
        part.sort(key=lambda name: (-tensors[name].element_size(), name))
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        write_file(folder / file, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def gpt_oss(folder: Path) -> Path:
    """Two layers with four experts in MXFP4, which are transposed in the file."""
    hidden, inner, experts = 64, 96, 4
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": hidden, "head_dim": 16,
        "intermediate_size": inner, "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": experts,
        "num_experts_per_tok": 2, "vocab_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False,
        "dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, hidden), "lm_head.weight": (64, hidden)}
    for layer in ("model.layers.0", "model.layers.1"):
        for name, rows, columns in (
            ("self_attn.q_proj", 64, hidden), ("self_attn.k_proj", 64, hidden), ("self_attn.v_proj", 64, hidden),
            ("self_attn.o_proj", hidden, 64), ("mlp.router", experts, hidden),
        ):  # fmt: skip
            shapes[f"{layer}.{name}.weight"], shapes[f"{layer}.{name}.bias"] = (rows, columns), (rows,)
        shapes[f"{layer}.self_attn.sinks"] = (4,)
        shapes[f"{layer}.mlp.experts.gate_up_proj"] = (experts, hidden, 2 * inner)
        shapes[f"{layer}.mlp.experts.gate_up_proj_bias"] = (experts, 2 * inner)
        shapes[f"{layer}.mlp.experts.down_proj"] = (experts, inner, hidden)
        shapes[f"{layer}.mlp.experts.down_proj_bias"] = (experts, hidden)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    experts_of = ("experts.gate_up_proj", "experts.down_proj")
    return quantized.write(
        folder,
        shapes,
        config,
        lambda name, shape, seed: quantized.mxfp4(name, shape, seed) if name.endswith(experts_of) else None,  # type: ignore[arg-type]
    ).folder


def checkpoint(work: Path, kind: str) -> Path:
    if kind == "mxfp4":
        return as_published(gpt_oss(work / "model"), 2)
    return as_published(written(work / "model", kind).folder, 2)


def places_in(folder: Path) -> dict[str, tuple[str, int]]:
    """Files, and bytes in them: of codes, scales, a small tensor, what nobody reads, and headers."""
    found: dict[str, tuple[str, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        for tensor in header.tensors:
            at = tensor.start + (tensor.stop - tensor.start) * 2 // 3
            if tensor.dtype in ("F8_E4M3", "U8", "I32") and not tensor.name.endswith(("_scales", "_shape")):
                found["codes"] = path.name, at
            elif "scale" in tensor.name:
                found["an unused scale" if "activation" in tensor.name else "scales"] = path.name, at
            elif tensor.name.endswith("_shape"):
                found["a shape"] = path.name, tensor.start  # found when it is read, too
            elif tensor.name.endswith("norm.weight"):
                found["a small tensor"] = path.name, at
        found["the header"] = path.name, path.read_bytes().index(b'"pt"') + 1
        found["the last byte"] = path.name, path.stat().st_size - 1
    found.pop("a shape", None)
    return found


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "int4", "mistral"])
def test_any_byte(hub: HubServer, tmp_path: Path, kind: str) -> None:
    folder = checkpoint(tmp_path, kind)
    repository = hub.repositories["org/model"] = Repository(folder_files(folder))
    places = places_in(folder)
    assert {"codes", "scales", "a small tensor", "the header"} <= set(places)
    for number, (what, (name, at)) in enumerate(places.items()):
        plan = compile_plan(folder, tp_size=number % 4 + 1, uneven=True)
        right = (folder / name).read_bytes()
        repository.digest(name)
        repository.files[name] = flipped(right, at)
        output, local = tmp_path / f"shards-{number}", tmp_path / f"local-{number}"
        fault = fault_of(plan, "org/model", output, workers=(1, 5)[number % 2], max_file_bytes=FILE_BYTES)
        assert fault.where == name, what
        repository.files[name] = right
        presplit(plan, folder, local, max_file_bytes=FILE_BYTES)
        again(plan, "org/model", output, local, workers=(5, 1)[number % 2], max_file_bytes=FILE_BYTES)


@pytest.mark.parametrize("what", ["codes", "scales", "a small tensor"])
def test_bytes_that_are_wrong_once(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched twice must be the same both times."""
    folder = checkpoint(tmp_path, "fp8")
    plan = compile_plan(folder, tp_size=2)
    presplit(plan, folder, tmp_path / "local")
    name, at = places_in(folder)[what]
    small = tmp_path / "small"
    small.mkdir()
    for path in folder.glob("*.json"):
        shutil.copy(path, small)
    paths = sorted(folder.glob("*.safetensors"))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    monkeypatch.setattr(source_hash, "WAITING_BYTES", 500)

    def run(wrong: int) -> tuple[int, bool]:
        files: dict[str, Any] = {path.name: Unsteady(path, -1) for path in paths}
        files[name] = file = Unsteady(folder / name, at, wrong)
        output = tmp_path / f"shards-{wrong}"
        try:
            presplit(plan, ModelFolder(given="far", folder=small, elsewhere=files, sha256=digests), output, workers=1)
        except CheckpointError as error:
            assert error.faults[0].code == "wrong-sha256"
            return file.reads, True
        assert tensors_of(output) == tensors_of(tmp_path / "local"), "an error that nobody noticed"
        return file.reads, False

    reads, refused = run(-1)
    assert not refused
    assert sum(run(wrong)[1] for wrong in range(reads)) >= 1 + (what == "scales")


def tensors_of(folder: Path) -> dict[str, bytes]:
    """What is in the files of a shards folder, behind the header."""
    return {path.name: path.read_bytes()[read_header(path).tensors[0].start :] for path in folder.glob("*.safetensors")}


LARGE = {**LLAMA, "hidden_size": 512, "intermediate_size": 1536, "head_dim": 64, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, Path]:
    """An fp8 checkpoint of 13 MB in four files, a plan of it, and its shards as presplit writes them from there."""
    work = tmp_path_factory.mktemp("large")
    settings, make = FORMATS["fp8"]
    config = {**LARGE, "quantization_config": settings}
    folder = as_published(quantized.write(work / "model", llama_shapes(LARGE), config, make).folder, 4)
    plan = compile_plan(folder, tp_size=2)
    presplit(plan, folder, work / "shards", max_file_bytes=2_000_000)
    return folder, plan, work / "shards"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("workers", [1, 4])
def test_each_byte_is_fetched_once(
    hub: HubServer, tmp_path: Path, large: tuple[Path, Plan, Path], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales lie before the codes: those are fetched twice. Without memory for what comes early, more is."""
    folder, plan, shards = large
    hub.repositories["org/model"] = Repository(folder_files(folder))
    presplit(plan, "org/model", tmp_path / "shards", max_file_bytes=2_000_000, workers=workers)
    assert same_files(tmp_path / "shards", shards)
    size, first = size_of(folder), hub.sent("/link")
    assert size < first < size * 1.08, "headers and samples are fetched besides"
    monkeypatch.setattr(source_hash, "WAITING_BYTES", 0)
    presplit(plan, "org/model", tmp_path / "again", max_file_bytes=2_000_000, workers=workers)
    assert same_files(tmp_path / "again", shards)
    assert hub.sent("/link") - first < size * (1.08 if workers == 1 else 2)


def test_killed_it_goes_on_from_what_was_compared(
    hub: HubServer, tmp_path: Path, large: tuple[Path, Plan, Path]
) -> None:
    """Files of the checkpoint that were compared are not fetched again, but for what all ranks share."""
    folder, plan, shards = large
    repository = hub.repositories["org/model"] = Repository(folder_files(folder))
    (tmp_path / "plan.json").write_text(plan.to_json())
    command = (
        "import sys; from autotp_plan.planner import Plan, presplit;"
        "presplit(Plan.read(sys.argv[1]), 'org/model', sys.argv[2], max_file_bytes=2_000_000, workers=2)"
    )

    def slowly(method: str, path: str) -> Trouble | None:
        time.sleep(0.02 if "/link" in path else 0)
        return None

    hub.trouble = slowly
    output = tmp_path / "shards"
    process = subprocess.Popen([sys.executable, "-c", command, str(tmp_path / "plan.json"), str(output)])
    while process.poll() is None and len(list(output.glob("tp-*"))) < 4:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    complete = {path.name: path.stat().st_mtime_ns for path in output.glob("tp-*")}
    assert 4 <= len(complete) < len(list(shards.glob("tp-*")))
    hub.trouble = lambda method, path: None
    journal = (output / ".autotp-unfinished").read_bytes()
    compared = [line["hashed"] for line in map(json.loads, journal.splitlines()) if "hashed" in line]
    assert 1 <= len(compared) < 4
    # a small tensor of a file that was compared: it is fetched again for the file that all ranks share
    right = (folder / compared[0]).read_bytes()
    norm = next(one for one in read_header(folder / compared[0]).tensors if one.name.endswith("norm.weight"))
    shutil.copytree(output, tmp_path / "copy", ignore=shutil.ignore_patterns("*.tmp"))

    def wrong_now(method: str, path: str) -> Trouble | None:
        if list((tmp_path / "copy").glob(".shared*.tmp")):  # samples were fetched
            repository.files[compared[0]] = flipped(right, norm.start + 3)
        return None

    hub.trouble = wrong_now
    fault = fault_of(plan, "org/model", tmp_path / "copy", max_file_bytes=2_000_000)
    assert fault.where == compared[0] and "a second time" in fault.got
    hub.trouble = lambda method, path: None
    repository.files[compared[0]] = right
    before = hub.sent("/link")
    presplit(plan, "org/model", output, max_file_bytes=2_000_000)
    assert same_files(output, shards)
    assert all((output / name).stat().st_mtime_ns == time for name, time in complete.items())
    assert hub.sent("/link") - before < 0.9 * size_of(folder), "some of what was compared is in files that were begun"


def test_what_was_not_compared_is_not_kept(hub: HubServer, tmp_path: Path, large: tuple[Path, Plan, Path]) -> None:
    """An attempt without checksums leaves files that nobody has compared."""
    folder, plan, shards = large
    repository = hub.repositories["org/model"] = Repository(folder_files(folder), has_checksums=False)
    name = sorted(repository.files)[2]
    right = (folder / name).read_bytes()
    repository.files[name] = flipped(right, len(right) - 10)
    stopped = 0

    def trouble(method: str, path: str) -> Trouble | None:
        nonlocal stopped
        if len(list((tmp_path / "shards").glob("tp-*"))) >= 4:
            stopped += 1
            return Trouble(403)
        return None

    hub.trouble = trouble
    with pytest.raises(CheckpointError):
        presplit(plan, "org/model", tmp_path / "shards", max_file_bytes=2_000_000)
    hub.trouble = lambda method, path: None
    repository.files[name], repository.has_checksums = right, True
    presplit(plan, "org/model", tmp_path / "shards", max_file_bytes=2_000_000)
    assert same_files(tmp_path / "shards", shards)


def test_cut_connections(hub: HubServer, tmp_path: Path, large: tuple[Path, Plan, Path]) -> None:
    folder, plan, shards = large
    hub.repositories["org/model"] = Repository(folder_files(folder))
    chance = random.Random(0)

    def trouble(method: str, path: str) -> Trouble | None:
        with hub.lock:
            return Trouble(cut=chance.randrange(300_000)) if "/link" in path and chance.random() < 0.3 else None

    hub.trouble = trouble
    presplit(plan, "org/model", tmp_path / "shards", max_file_bytes=2_000_000)
    assert same_files(tmp_path / "shards", shards)


def test_files_in_the_cache(hub: HubServer, tmp_path: Path, large: tuple[Path, Plan, Path]) -> None:
    folder, plan, shards = large
    hub.repositories["org/model"] = Repository(folder_files(folder))
    huggingface_hub.snapshot_download("org/model", ignore_patterns=["*00004-of*"])
    presplit(plan, "org/model", tmp_path / "shards", max_file_bytes=2_000_000)
    assert same_files(tmp_path / "shards", shards)
    (blob,) = (path.resolve() for path in (tmp_path / "cache").rglob("model-00002*"))
    blob.write_bytes(flipped(blob.read_bytes(), blob.stat().st_size // 5))
    fault = fault_of(plan, "org/model", tmp_path / "wrong", max_file_bytes=2_000_000)
    assert fault.where.startswith("model-00002") and fault.next.startswith(f"remove {blob}")
    blob.unlink()
    again(plan, "org/model", tmp_path / "wrong", shards, max_file_bytes=2_000_000)


def test_parts_say_that_they_do_not_compare(hub: HubServer, tmp_path: Path, large: tuple[Path, Plan, Path]) -> None:
    folder, plan, _ = large
    hub.repositories["org/model"] = Repository(folder_files(folder))
    (tmp_path / "plan.json").write_text(plan.to_json())
    command = ["presplit", str(tmp_path / "plan.json"), "--checkpoint", "org/model", "--quiet", "-o"]
    for options, said in (([], False), (["--part", "1/1"], True)):
        done = CliRunner().invoke(main, [*command, str(tmp_path / f"shards-{said}"), *options])
        assert done.exit_code == 0, done.output
        assert ("were not compared" in done.output) == said


def test_scales_in_files_of_their_own(hub: HubServer, tmp_path: Path) -> None:
    """They are read when their codes are, and their file, of which nothing else is made, is compared."""
    folder = written(tmp_path / "model").folder
    tensors: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        from safetensors.torch import load_file

        tensors.update(load_file(path))
    scales = {name: one for name, one in tensors.items() if "scale" in name}
    first, second = sorted(path.name for path in folder.glob("*.safetensors"))
    write_file(folder / first, {name: one for name, one in tensors.items() if name not in scales})
    write_file(folder / second, scales)
    weight_map = {name: second if name in scales else first for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    repository = hub.repositories["org/model"] = Repository(folder_files(folder))
    plan = compile_plan(folder, tp_size=3, uneven=True)
    presplit(plan, "org/model", tmp_path / "shards")
    presplit(plan, folder, tmp_path / "local")
    assert same_files(tmp_path / "shards", tmp_path / "local")
    right = (folder / second).read_bytes()
    repository.files[second] = flipped(right, len(right) - 2)
    assert fault_of(plan, "org/model", tmp_path / "wrong").where == second


def test_arrivals_in_any_order(tmp_path: Path) -> None:
    """The hash of a file whose bytes arrive in any order, some twice and some never, is that of the file."""
    from autotp_plan.planner.copying.source_check import Expected
    from autotp_plan.planner.copying.source_hash import SourceHash, Waiting

    path = tmp_path / "model.safetensors"
    write_file(path, {f"t{number}": torch.randn(number * 37 % 91 + 1) for number in range(30)})
    content = path.read_bytes()
    described = read_header(path)
    sha256 = hashlib.sha256(content).hexdigest()
    for seed in range(24):
        chance = random.Random(seed)
        expected = Expected(name=path.name, sha256=sha256, stored=path, described=described)
        found = SourceHash(expected, Waiting(chance.choice([0, 200, 10**6])))
        pieces = [
            (start, min(start + step, tensor.stop))
            for tensor in described.tensors
            if chance.random() < 0.8
            for step in [chance.choice([1, 7, 40, 400])]
            for start in range(tensor.start, tensor.stop, step)
        ]
        pieces += chance.sample(pieces, len(pieces) // 9)
        if seed % 3:
            chance.shuffle(pieces)
        for start, stop in pieces:
            found.arrived(start, memoryview(content)[start:stop])
            if chance.random() < 0.1:
                found.advance(chance.randrange(len(content)))
        found.advance(found.size)
        assert found.is_right
        read = {start for start, _ in pieces}
        assert all(found.agrees(tensor) for tensor in described.tensors if tensor.start in read)
        again = SourceHash(
            expected, Waiting(), [int(found.record()["parts"][at : at + 8], 16) for at in range(0, 8 * 31, 8)]
        )
        tensor = described.tensors[seed % 30]
        again.arrived(tensor.start, memoryview(flipped(content, tensor.start + 1))[tensor.start : tensor.stop])
        assert again.is_right and not again.agrees(tensor)
