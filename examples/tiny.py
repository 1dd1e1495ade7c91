"""Small random checkpoints made on the spot, so that the examples need no hub: `--model_name tiny-llama`.

A name of MODELS becomes a folder in `example-run/`, with a tokenizer of one token per byte; any other name is a folder
that the user has, or an id of the hub. Every process that asks makes the same files, and the first to be done puts them
in place.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

RUN = Path(__file__).parent.parent / "example-run"
COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 260,
          "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
MODELS = {
    "tiny-llama": {"model_type": "llama", "intermediate_size": 176, "num_key_value_heads": 4},
    "tiny-gpt-neox": {"model_type": "gpt_neox", "intermediate_size": 256},
}
HELP = (
    "a checkpoint folder, a shards folder or an id of the hub (org/name); "
    f"{' and '.join(MODELS)} are made on the spot, small and random"
)


def checkpoint(model_name: str) -> str:
    """Where the checkpoint `model_name` is."""
    if model_name not in MODELS:
        return model_name
    folder = RUN / model_name
    if not folder.exists():
        RUN.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=RUN) as work:
            made = Path(work, model_name)
            _save(made, MODELS[model_name])
            try:
                made.rename(folder)
            except OSError:  # another process was first
                if not folder.exists():
                    raise
    return str(folder)


def _save(folder: Path, config: dict[str, object]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<end>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    values = {**COMMON, **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    model.to(torch.float32).save_pretrained(folder)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in MODELS:
        print(checkpoint(name))
