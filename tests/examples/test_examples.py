"""The examples, by the commands at the top of their files and by every launcher: losses equal the dense model's."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autotp_plan.schemas.errors import CompileError, MismatchError
from tests.helpers.launch import launch
from tests.helpers.paths import EXAMPLES, ROOT
from tests.helpers.programs import output_of

TIMEOUT = 200


def commands_of(example: str) -> list[list[str]]:
    """The commands at the top of an example, as one would type them."""
    text = (EXAMPLES / example).read_text().split('"""')[1].replace("\\\\\n", " ")
    return [line.split() for line in text.splitlines() if line.startswith("    .venv/bin/")]


def command_of(example: str) -> list[str]:
    """The only command at the top of an example."""
    (command,) = commands_of(example)
    return command


def free_port() -> str:
    """A port below those that the kernel gives to sockets of other tests meanwhile."""
    while True:
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", random.SystemRandom().randrange(20000, 32000)))
            return str(one.getsockname()[1])


def run(words: list[str], folder: Path, timeout: float = TIMEOUT) -> str:
    """What a program prints that is run in `folder`, where `examples/` is as it is in a clone."""
    return output_of(words, folder, timeout=timeout, unset=["DS_ACCELERATOR"])


def losses_of(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+/\d+  loss (\d+\.\d+)", output, re.MULTILINE)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples, so that what they make does not land in the repository."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def examples(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the examples, from which they can be imported."""
    monkeypatch.syspath_prepend(str(clone / "examples"))
    yield clone / "examples"
    for name in ("tiny", "basic", "custom_patterns", "trainer"):
        sys.modules.pop(name, None)


def dense_losses(folder: Path, batches: list[list[dict[str, Any]]], learning_rate: float) -> list[float]:
    """The losses of the first data-parallel rank, with the mean gradient over all; DeepSpeed clips at 1."""
    import torch

    from tests.helpers.models import load_dense

    model = load_dense(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    for step in batches:
        found = [model(**batch).loss for batch in step]
        (sum(found) / len(found)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found[0].item())
    return losses


def synthetic(dp_size: int, num_steps: int) -> list[list[dict[str, Any]]]:
    """The batches of basic.py, by step and data-parallel rank."""
    import torch

    generators = [torch.Generator().manual_seed(rank) for rank in range(dp_size)]
    drawn = [[torch.randint(260, (1, 64), generator=one) for one in generators] for _ in range(num_steps)]
    return [[{"input_ids": tokens, "labels": tokens} for tokens in step] for step in drawn]


BASIC = ["examples/basic.py", "--model_name", "tiny-llama", "--dp_size", "1", "--tp_size", "2", "--seq_length", "64"]
BASIC += ["--num_steps", "3", "--precision", "fp32", "--learning_rate", "1e-3"]


@pytest.mark.distributed
@pytest.mark.timeout(TIMEOUT + 30)
def test_basic_example_has_the_dense_models_losses(clone: Path) -> None:
    command = [*command_of("basic.py"), "--learning_rate", "1e-3"]
    losses = losses_of(run(command, clone))
    expected = dense_losses(clone / "example-run" / "tiny-llama", synthetic(2, 5), 1e-3)
    assert losses == pytest.approx(expected, rel=1e-5)
    alone = dense_losses(clone / "example-run" / "tiny-llama", synthetic(1, 5), 1e-3)
    assert losses != pytest.approx(alone, rel=1e-5), "the other data-parallel rank must be heard"


@pytest.mark.distributed
@pytest.mark.timeout(TIMEOUT + 30)
def test_deepspeed_launcher_starts_the_basic_example(clone: Path) -> None:
    output = run(["deepspeed", "--num_gpus", "2", "--master_port", free_port(), *BASIC], clone)
    expected = dense_losses(clone / "example-run" / "tiny-llama", synthetic(1, 3), 1e-3)
    assert losses_of(output) == pytest.approx(expected, rel=1e-5)


@pytest.mark.distributed
@pytest.mark.timeout(TIMEOUT + 30)
@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), "deepspeed"])
def test_a_tp_group_may_span_two_nodes(clone: Path, launcher: str) -> None:
    """Two agents that meet on the loopback address, one process each: the TP group spans both nodes."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if launcher == "torchrun":
        # The store lives here, in neither node: a node that hosts it and ends first breaks the other's farewell.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        meeting += ["--rdzv-endpoint", f"127.0.0.1:{store.port}", "--rdzv-conf", "is_host=0"]
        commands = [["torchrun", *meeting, *BASIC]] * 2
    else:
        (clone / "hosts").write_text("one slots=1\ntwo slots=1\n")
        meeting = ["--hostfile", "hosts", "--num_nodes", "2", "--num_gpus", "1", "--no_ssh"]
        meeting += ["--master_addr", "127.0.0.1", "--master_port", free_port()]
        commands = [["deepspeed", *meeting, "--node_rank", str(rank), *BASIC] for rank in range(2)]
    with ThreadPoolExecutor(len(commands)) as nodes:
        outputs = list(nodes.map(lambda command: run(command, clone), commands))
    found = [losses for losses in map(losses_of, outputs) if losses]
    expected = dense_losses(clone / "example-run" / "tiny-llama", synthetic(1, 3), 1e-3)
    assert len(found) == 1 and found[0] == pytest.approx(expected, rel=1e-5), "rank 0 alone speaks"


@pytest.mark.distributed
@pytest.mark.timeout(TIMEOUT + 30)
def test_custom_patterns_example_has_the_dense_models_losses(examples: Path) -> None:
    from torch.utils.data.distributed import DistributedSampler
    from transformers import AutoTokenizer

    command = [*command_of("custom_patterns.py"), "--learning_rate", "1e-3", "--batch_size", "2"]
    losses = losses_of(run(command, examples.parent))
    import custom_patterns

    folder = examples.parent / "example-run" / "tiny-gpt-neox"
    dataset = custom_patterns.Sentences(AutoTokenizer.from_pretrained(folder), 64)
    batches: list[list[dict[str, Any]]] = []
    for epoch in range(4):
        by_rank = []
        for rank in range(2):
            sampler: Any = DistributedSampler(dataset, num_replicas=2, rank=rank, seed=42)
            sampler.set_epoch(epoch)
            drawn = [dataset[index] for index in sampler]
            by_rank.append([custom_patterns.collate(drawn[at : at + 2], 1) for at in range(0, len(drawn), 2)])
        batches += [list(step) for step in zip(*by_rank)]
    assert losses == pytest.approx(dense_losses(folder, batches[:10], 1e-3), rel=1e-5)


def test_the_original_shape_of_custom_patterns_is_refused(examples: Path) -> None:
    import custom_patterns
    import tiny

    folder = tiny.checkpoint("tiny-gpt-neox")
    with pytest.raises(CompileError, match="a rule splits a fused weight in the wrong place"):
        custom_patterns.compile_plan(folder, tp_size=2, specs=[custom_patterns.layer_specs(custom_patterns.ORIGINAL)])
    custom_patterns.compile_plan(folder, tp_size=2, specs=[custom_patterns.layer_specs(custom_patterns.HEADS)])


@pytest.mark.distributed
@pytest.mark.timeout(TIMEOUT + 30)
def test_own_model_example_has_the_dense_models_losses(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    prepare, train = commands_of("own_model/train.py")
    run(prepare, clone)
    losses = losses_of(run(train, clone))
    monkeypatch.syspath_prepend(str(EXAMPLES / "own_model"))
    from gpt import GPT

    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    expected = []
    for _ in range(10):
        loss, _ = model(tokens, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5) and losses[-1] < losses[0] - 0.5


@pytest.mark.distributed
@pytest.mark.timeout(3 * TIMEOUT)
def test_demo_has_the_unsharded_runs_losses(clone: Path) -> None:
    """What `make demo` runs; it compares a hundred losses with the unsharded run's by itself."""
    assert "\t$(BIN)/python examples/demo.py\n" in (ROOT / "Makefile").read_text()
    output = run(["python", "examples/demo.py"], clone, timeout=2.5 * TIMEOUT)
    assert float(re.findall(r"^largest relative difference over all 100 steps: (\S+)$", output, re.MULTILINE)[0]) < 1e-4


def test_every_example_is_run_here_and_says_how() -> None:
    run_here = {"basic.py", "custom_patterns.py", "trainer.py", "trl_sft.py", "ray_train.py", "own_model/train.py"}
    modules = {"tiny.py", "own_model/gpt.py"}
    found = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")}
    assert found == run_here | modules | {"demo.py"}, "an example that is not tested"
    for example in run_here:
        for program, *words in commands_of(example):
            assert program in (".venv/bin/torchrun", ".venv/bin/python") and f"examples/{example}" in words


# what a script written for AutoTP still says


def mpu_of(tp_rank: int, dp_rank: int, tp_size: int = 2, dp_size: int = 1) -> Any:
    """What an mpu of the original examples answers."""
    return SimpleNamespace(
        get_model_parallel_rank=lambda: tp_rank,
        get_model_parallel_world_size=lambda: tp_size,
        get_model_parallel_group=lambda: None,
        get_data_parallel_rank=lambda: dp_rank,
        get_data_parallel_world_size=lambda: dp_size,
        get_data_parallel_group=lambda: None,
    )


def old_calls(folder: Path) -> dict[str, Any]:
    import deepspeed
    import torch
    from deepspeed.module_inject.layers import set_autotp_mode
    from deepspeed.runtime.tensor_parallel import init_utils

    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan

    set_autotp_mode(training=True)
    deepspeed.init_distributed()
    plan = TrainingPlan(compile_plan(folder, tp_size=2))
    rank = torch.distributed.get_rank()
    config = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "tensor_parallel": {"autotp_size": 2}}
    found: dict[str, Any] = {}

    def steps(initialize: Any, **options: Any) -> list[float]:
        model = plan.load_model(folder)
        model = deepspeed.tp_model_init(model, tp_size=2, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine, *_ = initialize(model=model, optimizer=optimizer, config={**config}, **options)
        losses = []
        for (batch,) in synthetic(1, 3):
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        engine.destroy()
        return losses

    def refused(**options: Any) -> list[str]:
        try:
            steps(plan.initialize, **options)
        except MismatchError as error:
            return [fault.next for fault in error.faults]
        return []

    found["all of them"] = steps(plan.initialize, mpu=mpu_of(rank, 0))
    found["deepspeed.initialize"] = steps(deepspeed.initialize, mpu=mpu_of(rank, 0))
    found["dp rank first"] = refused(mpu=mpu_of(0, rank, 1, 2))
    recorded = init_utils._TP_MODEL_INIT_ARGS
    init_utils._TP_MODEL_INIT_ARGS = {"tp_size": 4, "dtype": torch.float32, "tp_group": object()}
    model = plan.load_model(folder)
    try:
        plan.initialize(model, config=config)
    except MismatchError as error:
        found["tp_model_init"] = [(fault.where, fault.next) for fault in error.faults]
    init_utils._TP_MODEL_INIT_ARGS = recorded
    return found


@pytest.mark.distributed
@pytest.mark.timeout(TIMEOUT + 30)
def test_calls_written_for_autotp_work_or_are_refused_with_the_line_to_delete(examples: Path) -> None:
    import tiny

    folder = tiny.checkpoint("tiny-llama")
    expected = dense_losses(folder, synthetic(1, 3), 1e-3)
    for found in launch(old_calls, 2, folder, timeout=TIMEOUT):
        assert found["all of them"] == pytest.approx(expected, rel=1e-5)
        assert found["deepspeed.initialize"] == pytest.approx(expected, rel=1e-5)
        assert set(found["dp rank first"]) == {"delete mpu=... and the lines that build it: the plan makes the groups"}
        assert found["tp_model_init"] == [
            (f"tp_model_init({key}=...)", "delete the call of deepspeed.tp_model_init: load_model has done it")
            for key in ("tp_group", "tp_size")
        ]


# Trainer


def entries(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"step"')]


@pytest.mark.distributed
@pytest.mark.timeout(2 * TIMEOUT)
def test_trainer_example_trains_evaluates_resumes_and_saves_like_the_unsharded_one(clone: Path) -> None:
    """Training, accumulation, evaluation and the batch size as unsharded; resumed; saved as a plain checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    command = command_of("trainer.py")
    sharded = entries(run(command, clone))
    out = clone / "example-run"
    dense_words = ["python", "examples/trainer.py", "--dense", "--batch_size", "4", "--output_dir", str(out / "dense")]
    dense = entries(run(dense_words, clone))
    assert [entry.keys() for entry in sharded] == [entry.keys() for entry in dense] and len(dense) == 9
    for ours, theirs in zip(sharded, dense):
        assert ours == pytest.approx(theirs, rel=1e-5)
    resumed = entries(run([*command, "--resume", str(out / "trainer" / "checkpoint-3")], clone))
    assert resumed == sharded, "to the last bit"
    whole, saved = (
        AutoModelForCausalLM.from_pretrained(out / name / "final").state_dict() for name in ("dense", "trainer")
    )
    assert whole.keys() == saved.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.distributed
@pytest.mark.timeout(TIMEOUT + 30)
def test_a_trainer_that_was_not_adapted_is_refused_at_the_first_step(clone: Path) -> None:
    """Each process would get samples of its own: said at the first step."""
    adapt = "        plan.adapt_trainer(trainer)\n"
    text = (EXAMPLES / "trainer.py").read_text()
    assert text.count(adapt) == 1
    (clone / "examples" / "unadapted.py").write_text(text.replace(adapt, "        pass\n"))
    command = [word.replace("trainer.py", "unadapted.py") for word in command_of("trainer.py")]
    output = output_of(command, clone, timeout=TIMEOUT, fails=True, unset=["DS_ACCELERATOR"])
    assert "a sharded model is wrapped by something that takes each rank's shards for the full model" in output
    assert "plan.adapt_trainer(trainer)" in output


@pytest.mark.distributed
@pytest.mark.timeout(2 * TIMEOUT)
def test_trl_example_has_the_dense_models_losses(clone: Path) -> None:
    command = command_of("trl_sft.py")
    found = [json.loads(line) for line in run(command, clone).splitlines() if line.startswith('{"step"')]
    dense_words = ["python", "examples/trl_sft.py", "--dense", "--batch_size", "4"]
    expected = [json.loads(line) for line in run(dense_words, clone).splitlines() if line.startswith('{"step"')]
    assert len(found) == len(expected) == 6
    for step, wanted in zip(found, expected):
        assert step == pytest.approx(wanted, rel=1e-5)


def trainer_saves(folder: Path, out: Path) -> dict[str, Any]:
    """Inside a rank: what Trainer saves under each ZeRO stage, beside the shards of the model that it trained."""
    import torch
    from accelerate.state import AcceleratorState
    from deepspeed.runtime.zero import GatheredParameters
    from transformers import Trainer, TrainingArguments

    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan
    from autotp_plan.runtime.data.text import TokenDataset, synthetic_tokens
    from autotp_plan.runtime.loading.local_shard import local_shard

    plan = TrainingPlan(compile_plan(folder, tp_size=2))
    data = TokenDataset(synthetic_tokens(256, 32 * 12), 12)
    found: dict[str, Any] = {}
    for stage in (0, 2, 3):
        AcceleratorState._reset_state(True)
        arguments = TrainingArguments(
            str(out), deepspeed={"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"},
            max_steps=2, learning_rate=1e-3, per_device_train_batch_size=2, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        model = plan.load_model(folder)
        trainer = Trainer(model, arguments, train_dataset=data)
        plan.adapt_trainer(trainer)
        trainer.train()
        trainer.save_model(str(out / str(stage)))
        if stage == 2:
            found["predictions"] = trainer.predict(torch.utils.data.Subset(data, range(11))).predictions.shape
        with GatheredParameters(list(model.parameters())):
            found[str(stage)] = {
                parameter.name: local_shard(model, parameter.name).detach().clone()  # type: ignore[union-attr]
                for parameter in plan.document.expanded()
            }
    AcceleratorState._reset_state(True)
    trainer = Trainer(plan.load_model(folder), TrainingArguments(str(out), use_cpu=True, report_to=[]))
    try:
        plan.adapt_trainer(trainer)
    except MismatchError as error:
        found["refused"] = str(error)
    assert torch.distributed.is_initialized()
    return found


@pytest.mark.upstream
@pytest.mark.distributed
@pytest.mark.timeout(TIMEOUT + 30)
@pytest.mark.parametrize("variant", ["llama_bias_tied"])
def test_trainer_saves_what_it_trained(tmp_path: Path, variant: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime.tensor_parallel.collectives import take
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(tmp_path / "checkpoint", variant)
    plan = compile_plan(folder, tp_size=2)
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for rank, found in enumerate(launch(trainer_saves, 2, folder, tmp_path / "out", timeout=TIMEOUT)):
        assert "the Trainer does not run under DeepSpeed" in found.pop("refused")
        assert found.pop("predictions") == (11, 12, 256), "each sample once"
        for stage, shards in found.items():
            saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / stage).state_dict()
            for parameter in plan.expanded():
                layout, whole = plan.layouts[parameter.layout], saved[parameter.name]
                mine = whole if layout.dim is None else take(whole, layout.intervals[rank], layout.dim)
                assert torch.equal(mine, shards[parameter.name]), (stage, parameter.name)
            assert any(not torch.equal(saved[name], before[name]) for name in before), "nothing was trained"
