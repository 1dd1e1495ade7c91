"""python -m benchmarks.loss_memory [--tp 2] [--tokens 2048] [--hidden 1024] [--words 131072] [--chunks 64] [--rounds 3]
                                 [--dtype float32]

What the loss takes, from the hidden states to their gradient and the head's: at once, and in chunks of words. A real
model computes it, of which all below the head is replaced by given hidden states. Prints for one rank the most that was
alive at a time, as a share of the full logits (tokens x words x bytes of the dtype), beside the two gradients, which
are the result; the growth of RssAnon, gradients included; and the time, of both in turns in one process.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autotp_plan.runtime.verify.workers import run_ranks

TARGET = 0.05
"""Of the full logits."""


class Given(nn.Module):
    """The layers below the head: hidden states that are there."""

    def __init__(self, embed_tokens: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens  # without which transformers finds no head
        self.hidden = hidden

    def forward(self, **_: Any) -> Any:
        """The same for any inputs."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


class Loss:
    """A model's loss of given hidden states, and its gradients.

    Args:
        folder: the checkpoint.
        options: of the command line.
        chunks: `loss_chunks` of `load_model`.
    """

    def __init__(self, folder: Path, options: dict[str, Any], chunks: int | None) -> None:
        import torch

        from autotp_plan.planner import compile_plan
        from autotp_plan.runtime import TrainingPlan

        dtype = getattr(torch, options["dtype"])
        plan: Any = TrainingPlan(compile_plan(folder, tp_size=options["tp"]))
        self.model: Any = plan.load_model(folder, dtype=dtype, loss_chunks=chunks, check_batches_every=None).train()
        generator = torch.Generator().manual_seed(0)
        shape = 1, options["tokens"]
        self.tokens = torch.randint(options["words"], shape, generator=generator)
        self.hidden = torch.randn(*shape, options["hidden"], generator=generator).to(dtype).requires_grad_()
        embed_tokens: Any = self.model.get_input_embeddings()
        self.model.model = Given(embed_tokens, self.hidden)
        self.weight: Any = self.model.get_parameter("lm_head.weight")

    def forward(self) -> Tensor:
        """The loss."""
        loss: Tensor = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        return loss

    def forget(self) -> None:
        """Take the gradients away."""
        self.hidden.grad = self.weight.grad = None

    @property
    def gradient_bytes(self) -> int:
        """Of both gradients."""
        return sum(one.numel() * one.element_size() for one in (self.hidden, self.weight))


def memory(folder: Path, options: dict[str, Any], chunks: int | None) -> dict[str, float]:
    """Bytes: the most that was alive beside the gradients, and what RssAnon grew by; and the loss."""
    from autotp_plan.runtime.estimate.fake_internals import Watch

    loss = Loss(folder, options, chunks)
    before = _rss_anon()
    with _Peak() as peak:
        loss.forward().backward()
    loss.forget()
    gc.collect()
    with Watch(lambda *_: None, held=[*loss.model.parameters(), loss.hidden, loss.tokens]) as watch:
        value = loss.forward()
        forward = watch.restart_peak()
        value.backward()
        backward = watch.restart_peak() - loss.gradient_bytes
    return {
        "alive": max(forward, backward),
        "grown": peak.most - before,
        "gradients": loss.gradient_bytes,
        "loss": value.item(),
    }


def seconds(folder: Path, options: dict[str, Any]) -> tuple[float, float]:
    """Median seconds of a forward and backward of the loss at once, and in chunks, in turns."""
    kinds = Loss(folder, options, None), Loss(folder, options, options["chunks"])
    found: tuple[list[float], list[float]] = ([], [])
    for step in range(options["rounds"] + 1):
        for loss, times in zip(kinds, found):
            began = time.perf_counter()
            loss.forward().backward()
            if step:  # the first one allocates
                times.append(time.perf_counter() - began)
            loss.forget()
    return statistics.median(found[0]), statistics.median(found[1])


class _Peak:
    """The largest RssAnon while active, looked at every millisecond."""

    def __enter__(self) -> _Peak:
        self.most, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.001):
            self.most = max(self.most, _rss_anon())


def _rss_anon() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _write_model(folder: Path, options: dict[str, Any]) -> None:
    """A random Llama whose head is of the given size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        hidden_size=options["hidden"], intermediate_size=64, vocab_size=options["words"], num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"tp": 2, "tokens": 2048, "hidden": 1024, "words": 131072, "chunks": 64, "rounds": 3}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = vars(parser.parse_args())
    logits = options["tokens"] * options["words"] * {"float32": 4, "bfloat16": 2}[options["dtype"]]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        _write_model(folder, options)
        found = {
            chunks: run_ranks(memory, options["tp"], folder, options, chunks, timeout=900)[0]
            for chunks in (None, options["chunks"])
        }
        at_once, in_chunks = run_ranks(seconds, options["tp"], folder, options, timeout=900)[0]
    print(f"full logits                  {logits / 2**20:10.0f} MiB   {options['dtype']}, TP={options['tp']}")
    print(f"the two gradients            {found[None]['gradients'] / 2**20:10.0f} MiB")
    for chunks, one in found.items():
        name = "at once" if chunks is None else f"in {chunks} chunks"
        print(
            f"{name:15} alive         {one['alive'] / 2**20:10.1f} MiB   {one['alive'] / logits:.2%} of full logits\n"
            f"{'':15} RssAnon grows {one['grown'] / 2**20:10.1f} MiB\n"
            f"{'':15} loss          {one['loss']:14.6f}"
        )
    share = found[options["chunks"]]["alive"] / logits
    print(f"time            {at_once:.2f} s at once, {in_chunks:.2f} s in chunks: {in_chunks / at_once:.2f}")
    print(f"target: below {TARGET:.0%} of the full logits   {'met' if share < TARGET else 'missed'}")


if __name__ == "__main__":
    main()
