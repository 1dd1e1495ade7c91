"""The checksums of files that were fetched are those of what was written, however a plan shards them."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotp_plan.planner import compile_plan, presplit
from autotp_plan.planner.copying import bytes_in_order, copy_engine
from autotp_plan.schemas.errors import CheckpointError, OutputError
from autotp_plan.schemas.storage.files import ByteRange, Reader, Span
from autotp_plan.sources.model_folder import ModelFolder
from tests.helpers.checkpoints import write_llama
from tests.helpers.random_shards import files_of, random_model, random_plan, write_random

SETTINGS = settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """A file that is read as if it were far away."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def read_into(self, target: memoryview, spans: Sequence[Span], reader: Reader) -> None:
        reader.read_into(target, [ByteRange(self.path, *span) for span in spans])


def far(folder: Path, work: Path) -> ModelFolder:
    """A folder whose weights are elsewhere, with their checksums."""
    work.mkdir()
    weights = sorted(folder.glob("*.safetensors"))
    for path in folder.iterdir():
        if path not in weights:
            (work / path.name).write_bytes(path.read_bytes())
    return ModelFolder(
        given="elsewhere",
        folder=work,
        elsewhere={path.name: Elsewhere(path) for path in weights},
        sha256={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights},
    )


@SETTINGS
@given(
    random=st.randoms(use_true_random=False),
    tp_size=st.integers(1, 5),
    chunk=st.sampled_from([1, 7, 50, 1 << 20]),
    most=st.sampled_from([20, 100, 1 << 30]),
)
def test_any_layout(random: Random, tp_size: int, chunk: int, most: int) -> None:
    model = random_model(random)
    plan = random_plan(model, tp_size, random)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy_engine, "CHUNK_BYTES", chunk)
        patch.setattr(bytes_in_order, "CHUNK_BYTES", chunk)
        work = Path(name)
        original = write_random(model, work / "original", random)
        place = far(original, work / "small")
        presplit(plan, place, work / "shards", max_file_bytes=most)
        presplit(plan, original, work / "local", max_file_bytes=most)
        assert files_of(work / "shards") == files_of(work / "local")
        wrong = random.choice(sorted(place.sha256))
        place = dataclasses.replace(place, sha256={**place.sha256, wrong: "0" * 64})
        with pytest.raises(CheckpointError, match=wrong):
            presplit(plan, place, work / "wrong", max_file_bytes=most)
        presplit(plan, original, work / "wrong", max_file_bytes=most)
        assert files_of(work / "wrong") == files_of(work / "local")


def test_weights_that_are_transposed_in_the_checkpoint(tmp_path: Path) -> None:
    """Square ones, so that a plan for them fits either way."""
    folder = write_llama(tmp_path / "llama", num_files=2)
    plan = compile_plan(folder, tp_size=2)
    parameters = tuple(
        dataclasses.replace(entry, transposed=entry.name.endswith(("q_proj.weight", "o_proj.weight")))
        for entry in plan.parameters
    )
    plan = dataclasses.replace(plan, parameters=parameters)
    presplit(plan, far(folder, tmp_path / "small"), tmp_path / "shards")
    presplit(plan, folder, tmp_path / "local")
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "local")


def test_parts(tmp_path: Path) -> None:
    """Whoever completes the last part compares what all have written."""
    folder = write_llama(tmp_path / "llama", num_files=3)
    plan = compile_plan(folder, tp_size=2)
    place = far(folder, tmp_path / "small")
    assert presplit(plan, place, tmp_path / "shards", part=(2, 2)) is None
    name = sorted(place.sha256)[0]
    wrong = dataclasses.replace(place, sha256={**place.sha256, name: "0" * 64})
    with pytest.raises(CheckpointError, match=name):
        presplit(plan, wrong, tmp_path / "shards", part=(1, 2))
    with pytest.raises(OutputError, match="--part 2/2 again"):
        presplit(plan, place, tmp_path / "shards", part=(1, 2))
    assert presplit(plan, place, tmp_path / "shards", part=(2, 2)) is not None
    presplit(plan, folder, tmp_path / "local")
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "local")
