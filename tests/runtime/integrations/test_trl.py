"""TRL's trainers on a sharded model log what they log on the dense one, or are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]


def sft(model: Any, load: Callable[[], Any], out: Path, deepspeed: Any, **options: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.helpers import trl

    data = Dataset.from_list([{"text": trl.text(seed)} for seed in range(16)])
    config = SFTConfig(str(out), deepspeed=deepspeed, **trl.CONFIG)
    return SFTTrainer(
        model, config, train_dataset=data, eval_dataset=data.select(range(5)), processing_class=trl.tokenizer()
    )


def preferences() -> Any:
    from datasets import Dataset

    from tests.helpers import trl

    return Dataset.from_list(
        [
            {"prompt": trl.text(seed), "chosen": " " + trl.text(seed + 100), "rejected": " " + trl.text(seed + 200)}
            for seed in range(16)
        ]
    )


def dpo(model: Any, load: Callable[[], Any], out: Path, deepspeed: Any, **options: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    from tests.helpers import trl

    data = preferences()
    config = DPOConfig(str(out), deepspeed=deepspeed, **trl.CONFIG, **options)
    return DPOTrainer(
        model, load(), args=config, train_dataset=data, eval_dataset=data.select(range(5)),
        processing_class=trl.tokenizer(),
    )  # fmt: skip


def kto(model: Any, load: Callable[[], Any], out: Path, deepspeed: Any, **options: Any) -> Any:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    from tests.helpers import trl

    data = Dataset.from_list(
        [
            {"prompt": trl.text(seed), "completion": " " + trl.text(seed + 100), "label": seed % 2 == 0}
            for seed in range(16)
        ]
    )
    config = KTOConfig(str(out), deepspeed=deepspeed, **trl.CONFIG)
    return KTOTrainer(model, load(), args=config, train_dataset=data, processing_class=trl.tokenizer())


def reward(model: Any, load: Callable[[], Any], out: Path, deepspeed: Any, **options: Any) -> Any:
    from trl import RewardConfig, RewardTrainer

    from tests.helpers import trl

    data = preferences().remove_columns("prompt")
    config = RewardConfig(str(out), deepspeed=deepspeed, **trl.CONFIG)
    return RewardTrainer(
        model, config, train_dataset=data, eval_dataset=data.select(range(5)), processing_class=trl.tokenizer()
    )


def orpo(model: Any, load: Callable[[], Any], out: Path, deepspeed: Any, **options: Any) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from tests.helpers import trl

    config = ORPOConfig(str(out), deepspeed=deepspeed, **trl.CONFIG)
    return ORPOTrainer(model, args=config, train_dataset=preferences(), processing_class=trl.tokenizer())


def words_of(completions: list[str], **_: Any) -> list[float]:
    """A reward that says which tokens were drawn."""
    return [sum(int(word[1:]) for word in one.split() if word[0] == "w") % 17 / 4 for one in completions]


def generating(name: str, defaults: dict[str, Any]) -> Callable[..., Any]:
    def make(model: Any, load: Callable[[], Any], out: Path, deepspeed: Any, **options: Any) -> Any:
        import trl as library
        from datasets import Dataset

        from tests.helpers import trl

        data = Dataset.from_list([{"prompt": trl.text(seed)} for seed in range(16)])
        funcs = options.pop("reward_funcs", words_of)
        settings: dict[str, Any] = {**trl.CONFIG, "num_generations": 2, "max_completion_length": 4, "temperature": 0.9}
        config = getattr(library, f"{name}Config")(str(out), deepspeed=deepspeed, **{**settings, **defaults, **options})
        return getattr(library, f"{name}Trainer")(
            model, reward_funcs=funcs, args=config, train_dataset=data, eval_dataset=data.select(range(4)),
            processing_class=trl.tokenizer(),
        )  # fmt: skip

    return make


GROUPS = {"num_generations": 4, "num_generations_eval": 2, "gradient_accumulation_steps": 2}
TRAINERS: dict[str, Callable[..., Any]] = {
    "sft": sft, "dpo": dpo, "kto": kto, "reward": reward,
    "grpo": generating("GRPO", {**GROUPS, "num_iterations": 2, "scale_rewards": "batch"}),
    "grpo, reference": generating("GRPO", {**GROUPS, "beta": 0.1}),
    "grpo, own loss": generating("GRPO", {"per_device_train_batch_size": 4, "top_entropy_quantile": 0.5,
                                          "loss_type": "grpo"}),
    "rloo": generating("RLOO", {**GROUPS, "beta": 0.0}),
    # of two data-parallel ranks, with half a group on each:
    "rloo, reference": generating("RLOO", {"num_generations": 4, "num_generations_eval": 2}),
}  # fmt: skip


def with_lora(model: Any, adapt: Callable[[Any, Any], Any]) -> Any:
    import torch
    from peft import LoraConfig

    torch.manual_seed(0)
    task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights="gaussian", task_type=task
    )
    return adapt(model, config)


def run(trainer: Any) -> list[dict[str, float]]:
    from tests.helpers import trl

    trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    return trl.history(trainer)


def dense(folder: Path, out: Path, lora: bool, names: list[str]) -> dict[str, Any]:
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    from tests.helpers.models import load_dense

    warnings.simplefilter("ignore")
    found = {}
    for name in names:
        if name == "reward":
            model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
        else:
            model = load_dense(folder)
        if lora:
            model = with_lora(model, get_peft_model)
        load = (lambda: None) if lora else (lambda: load_dense(folder))
        found[name] = run(TRAINERS[name](model, load, out, None))
    return found


def sharded(folder: Path, plan_file: Path, out: Path, lora: bool, runs: list[tuple[str, int]]) -> list[Any]:
    from autotp_plan.runtime import load_plan
    from tests.helpers import trl

    warnings.simplefilter("ignore")
    plan = load_plan(plan_file)
    found = []
    for name, stage in runs:
        trl.forget_accelerator()
        model = plan.load_model(folder)
        if lora:
            model = with_lora(model, plan.add_lora)
        reference = (lambda: None) if lora else (lambda: plan.load_model(folder))
        config = trl.deepspeed_config(stage, tp_size=2 if name in ("dpo", "kto") and not lora else 0)
        trainer = TRAINERS[name](model, reference, out, config)
        plan.adapt_trainer(trainer)
        found.append(run(trainer))
    return found


def assert_equal(found: list[dict[str, float]], expected: list[dict[str, float]], missing: set[str], run: Any) -> None:
    assert len(found) == len(expected)
    for step, wanted in zip(found, expected):
        assert step.keys() | missing >= wanted.keys(), (run, step, wanted)
        for key in step.keys() & wanted.keys():
            of_difference = "reward" in key or "margin" in key  # of larger numbers, in float32
            close = pytest.approx(wanted[key], rel=1e-5, abs=1e-5 if of_difference else 2e-6)
            assert step[key] == close, (run, key, step, wanted)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autotp_plan.planner import compile_plan
    from tests.helpers import trl

    folder = tmp_path_factory.mktemp("trl")
    for name, variant in (("plain", "llama"), ("tied", "llama_bias_tied"), ("head", "llama")):
        checkpoint = trl.make_checkpoint(folder / name, variant, has_reward_head=name == "head")
        plan = compile_plan(checkpoint, tp_size=2)
        (folder / f"{name}.json").write_text(plan.to_json())
    return folder


@pytest.mark.parametrize(
    ("model", "lora", "dp_size", "runs"),
    [
        ("plain", False, 1, [("sft", 0), ("sft", 2), ("sft", 3), ("dpo", 1), ("kto", 2)]),
        ("plain", False, 1, [("grpo, reference", 1), ("grpo, own loss", 3), ("rloo", 2)]),
        ("plain", False, 2, [("rloo, reference", 1), ("grpo", 3), ("sft", 1), ("dpo", 2)]),
        ("tied", False, 1, [("sft", 1)]),
        ("plain", True, 1, [("sft", 1), ("dpo", 1), ("kto", 1), ("grpo, reference", 1)]),
        ("head", False, 1, [("reward", 1)]),
        ("head", True, 1, [("reward", 1)]),
    ],
    ids=["plain", "generating", "two data-parallel ranks", "tied", "lora", "reward", "reward, lora"],
)
def test_trainers_log_what_they_do_for_the_dense_model(
    work: Path, tmp_path: Path, model: str, lora: bool, dp_size: int, runs: list[tuple[str, int]]
) -> None:
    names = list(dict.fromkeys(name for name, _ in runs))
    expected = launch(dense, dp_size, work / model, tmp_path, lora, names)[0]
    for history in expected.values():  # the loss of a first step on new completions may be 0
        steps = {(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry}
        assert len(steps) == 3, "each step is another"
    for ranks in launch(sharded, 2 * dp_size, work / model, work / f"{model}.json", tmp_path, lora, runs):
        for (name, stage), found in zip(runs, ranks):  # without ZeRO and with fp32 there is no norm in DeepSpeed
            assert_equal(found, expected[name], set() if stage else {"grad_norm"}, (name, stage))


def refusals(folder: Path, plan_file: Path, out: Path) -> dict[str, str]:
    from autotp_plan.runtime import load_plan
    from autotp_plan.schemas.errors import MismatchError
    from tests.helpers import trl
    from tests.helpers.models import load_dense

    warnings.simplefilter("ignore")
    plan = load_plan(plan_file)
    ways: dict[str, tuple[Callable[..., Any], Callable[[], Any], int, dict[str, Any]]] = {
        "no reference": (dpo, lambda: None, 0, {}),
        "reference by name, KTO": (kto, lambda: None, 0, {}),
        "dense reference": (dpo, lambda: load_dense(folder), 0, {}),
        "reference without autotp_size": (dpo, lambda: plan.load_model(folder), 0, {}),
        "precomputed": (dpo, lambda: plan.load_model(folder), 2, {"precompute_ref_log_probs": True}),
        "another trainer": (orpo, lambda: None, 0, {}),
        "groups": (TRAINERS["grpo, own loss"], lambda: None, 0, {"num_generations": 8}),
        "scheduler": (TRAINERS["grpo, own loss"], lambda: None, 0, {"use_transformers_continuous_batching": True}),
        "reference by names": (TRAINERS["grpo, reference"], lambda: None, 2, {}),
    }
    found = {}
    for name, (make, reference, tp_size, options) in ways.items():
        trl.forget_accelerator()
        try:
            trainer = make(plan.load_model(folder), reference, out, trl.deepspeed_config(1, tp_size), **options)
            plan.adapt_trainer(trainer)
        except MismatchError as error:
            found[name] = str(error)
        else:
            found[name] = "not refused"
    return found


def test_what_would_be_wrong_is_refused(work: Path, tmp_path: Path) -> None:
    for found in launch(refusals, 2, work / "plain", work / "plain.json", tmp_path):
        for name in ("no reference", "reference by name, KTO", "dense reference"):
            assert "the reference model is not sharded" in found[name], (name, found[name])
            assert "ref_model=plan.load_model(path)" in found[name] and '"autotp_size": 2' in found[name]
        assert "tensor_parallel.autotp_size: 2" in found["reference without autotp_size"]
        assert "the state dict of a sharded model holds one rank's shards" in found["precomputed"]  # TRL hashes it
        assert "ORPOTrainer" in found["another trainer"] and "tp_size 1" in found["another trainer"]
        assert "4 completions" in found["groups"] and "steps_per_generation=8" in found["groups"]
        assert "use_transformers_continuous_batching" in found["scheduler"]
        assert "leave tensor_parallel out of the DeepSpeed config" in found["reference by names"]
