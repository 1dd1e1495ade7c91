"""The whole path on one machine, in about two minutes: plan, show, pre-split, train at TP=2, compare.

    make demo

Makes a small Llama-shaped checkpoint with a tokenizer trained on the spot, trains it on the source of Python's standard
library at TP=2 (two processes, gloo) and unsharded, and prints both loss columns. Everything lands in `demo-run/`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RUN = ROOT / "demo-run"
TP_SIZE, NUM_STEPS, BATCH_SIZE, SEQ_LENGTH = 2, 100, 4, 256
# Training amplifies rounding errors: at a higher rate two right runs drift apart within a hundred steps, as DeepSpeed's
# ZeRO 1 and plain PyTorch do without any tensor parallelism. At this one a real difference cannot hide in that noise.
ADAM = {"lr": 3e-4, "eps": 1e-5, "weight_decay": 0.01}
VOCAB_SIZE = 4096
BIN = Path(sys.executable).parent


def main() -> None:
    began = time.monotonic()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
    if not torch.accelerator.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    if RUN.exists():
        shutil.rmtree(RUN)
    (RUN / "text").mkdir(parents=True)
    heading("a checkpoint and a text")
    make_text()
    make_checkpoint()
    heading("the plan")
    run("autotp-plan", "compile", "--model", "checkpoint", "--tp", TP_SIZE, "-o", "plan.json")
    run("autotp-plan", "show", "plan.json")
    run("autotp-plan", "check", "plan.json", "--checkpoint", "checkpoint")
    heading("the shards")
    run("autotp-plan", "presplit", "plan.json", "--checkpoint", "checkpoint", "-o", "shards")
    heading(f"training at TP={TP_SIZE}")
    config = {
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
    }
    (RUN / "ds_config.json").write_text(json.dumps(config, indent=2) + "\n")
    run("torchrun", "--nproc-per-node", TP_SIZE, "-m", "autotp_plan.runtime.train", "--plan", "plan.json",
        "--shards", "shards", "--ds-config", "ds_config.json", "--batch-size", BATCH_SIZE, "--seq-length", SEQ_LENGTH,
        "--num-steps", NUM_STEPS, "--data", "text", "--metrics", "tp2.jsonl", every=10)  # fmt: skip
    heading("the same steps, unsharded")
    run("python", ROOT / "examples" / "demo.py", "dense", every=10)
    compare()
    print(f"\nall of it took {time.monotonic() - began:.0f} s")


def make_text() -> None:
    """The top-level modules of the standard library, which every machine has."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for file in files:
        (RUN / "text" / f"{file.stem}.txt").write_text(file.read_text(encoding="utf-8", errors="replace"))
    size = sum(file.stat().st_size for file in files)
    print(f"text: {len(files)} modules of the standard library, {size / 2**20:.1f} MiB")


def make_checkpoint() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in sorted((RUN / "text").iterdir())[:80]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(RUN / "checkpoint")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=SEQ_LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(RUN / "checkpoint", max_shard_size="10MB")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"checkpoint: a Llama of {count / 1e6:.1f} million parameters, a tokenizer of {VOCAB_SIZE} tokens")


def dense() -> None:
    """The unsharded run: the plain model, PyTorch's optimizer, the same batches, clipped alike."""
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from autotp_plan.runtime.data.text import TokenDataset, text_tokens

    os.chdir(RUN)
    model = AutoModelForCausalLM.from_pretrained("checkpoint", dtype=torch.float32, trust_remote_code=False).train()
    tokenizer = AutoTokenizer.from_pretrained("checkpoint", trust_remote_code=False)
    tokens = text_tokens(Path("text"), tokenizer, NUM_STEPS * BATCH_SIZE * SEQ_LENGTH)
    dataset = TokenDataset(tokens, SEQ_LENGTH)
    loader = DataLoader(dataset, BATCH_SIZE, sampler=DistributedSampler(dataset, num_replicas=1, rank=0))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    with open("dense.jsonl", "w") as file:
        for step, batch in enumerate(loader, 1):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step:>{len(str(NUM_STEPS))}}/{NUM_STEPS}  loss {loss.item():.4f}", flush=True)
            file.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")


def compare() -> None:
    heading("both, side by side")
    sharded, unsharded = (
        [json.loads(line)["loss"] for line in (RUN / name).read_text().splitlines()]
        for name in ("tp2.jsonl", "dense.jsonl")
    )
    assert len(sharded) == len(unsharded) == NUM_STEPS, "a run ended early"
    print(f"step   loss at TP={TP_SIZE}   loss unsharded   difference")
    for step in (*range(0, NUM_STEPS, 10), NUM_STEPS - 1):
        difference = abs(sharded[step] - unsharded[step])
        print(f"{step + 1:4}   {sharded[step]:12.6f}   {unsharded[step]:14.6f}   {difference:10.1e}")
    worst = max(abs(a - b) / b for a, b in zip(sharded, unsharded))
    print(f"largest relative difference over all {NUM_STEPS} steps: {worst:.1e}")
    if not (math.isfinite(worst) and worst < 1e-4 and sharded[-1] < sharded[0]):
        sys.exit("the sharded run does not equal the unsharded one")


def run(program: str, *arguments: object, every: int = 1) -> None:
    """Run a command in `demo-run/`, shown as one would type it; of its steps, show the first and every tenth."""
    words = [str(argument) for argument in arguments]
    print(f"$ {program} {' '.join(words)}".replace(str(ROOT), ".."), flush=True)
    environment = {**os.environ, "COLUMNS": "150"}
    if program == "torchrun":
        environment["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(
        [str(BIN / program), *words], cwd=RUN, env=environment, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    for line in process.stdout:
        step = int(line.split()[1].split("/")[0]) if line.startswith("step ") else 1
        if step == 1 or step % every == 0:
            print(line.rstrip(), flush=True)
    if process.wait():
        sys.exit(f"{program} failed with status {process.returncode}")


def heading(text: str) -> None:
    print(f"\n== {text} ==", flush=True)


if __name__ == "__main__":
    dense() if sys.argv[1:] == ["dense"] else main()
