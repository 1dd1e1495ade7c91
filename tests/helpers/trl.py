"""TRL's trainers on tiny models: a tokenizer without a download, data, and the numbers of each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 3e-4,
    "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "bf16": False,
    "gradient_checkpointing": False,
}  # fmt: skip
"""What all trainers are given."""

UNCOUNTED = ("runtime", "per_second", "epoch", "total_flos", "step")
"""What a trainer logs of time, not of the model."""


def deepspeed_config(stage: int, tp_size: int = 0) -> dict[str, Any]:
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config: dict[str, Any] = {**dict.fromkeys(auto, "auto"), "zero_optimization": {"stage": stage}}
    return {**config, "tensor_parallel": {"autotp_size": tp_size}} if tp_size else config


def tokenizer(vocab_size: int = 256) -> Any:
    """One word for each token id: `w7` is 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{number}": number for number in range(4, vocab_size)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return found


def text(seed: int, low: int = 4, high: int = 10, vocab_size: int = 256) -> str:
    """Some words, the same for a seed."""
    import torch

    drawn = torch.Generator().manual_seed(seed)
    length = int(torch.randint(low, high, (1,), generator=drawn))
    return " ".join(f"w{number}" for number in torch.randint(4, vocab_size, (length,), generator=drawn).tolist())


def history(trainer: Any) -> list[dict[str, float]]:
    """What `trainer` logged of the model: losses, gradient norms, rewards."""
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in UNCOUNTED)}
        for entry in trainer.state.log_history
    ]


def forget_accelerator() -> None:
    """Let the next trainer of this process have another config."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def make_checkpoint(folder: Path, variant: str, has_reward_head: bool = False) -> Path:
    from transformers import AutoModelForSequenceClassification

    from autotp_plan.runtime.verify.random_inputs import randomise
    from tests.helpers.models import make_config, save_checkpoint

    if has_reward_head:
        model = AutoModelForSequenceClassification.from_config(make_config(variant, num_labels=1))
        randomise(model)
        model.save_pretrained(folder)
    else:
        save_checkpoint(folder, variant)
    tokenizer().save_pretrained(folder)
    return folder
