"""An estimate as tables, for people. Returns data; printing is the CLI's."""

from __future__ import annotations

from autotp_plan.planner.plan_table import human_bytes
from autotp_plan.schemas.estimate.document import Estimate, Part, RankEstimate


def headline(estimate: Estimate) -> str:
    """`LlamaForCausalLM at TP=8 x DP=4, ZeRO 2, 1 x 4096 tokens, bf16, adamw`."""
    settings = estimate.settings
    words = [
        f"{estimate.model or 'a model without a config'} at TP={estimate.tp_size} x DP={settings.dp_size}",
        f"ZeRO {settings.zero_stage}",
        f"{settings.micro_batch_size} x {settings.seq_length} tokens"
        + (f" x {settings.gradient_accumulation_steps}" if settings.gradient_accumulation_steps > 1 else ""),
        settings.dtype,
        settings.optimizer + (" on the host" if settings.offload == "optimizer" else ""),
    ]
    if settings.recomputed is not None:
        words.append({"full": "activation checkpointing", "selective": "selective checkpointing"}[settings.recomputed])
    if settings.loss_chunks is not None:
        words.append(f"loss in {settings.loss_chunks} chunks")
    return ", ".join(words)


def rank_tables(estimate: Estimate, rank: RankEstimate) -> list[list[tuple[str, ...]]]:
    """What a kind of rank takes, as tables: lists of rows whose first one has the titles."""
    ranks = _ranks(rank.tp_ranks)
    tables = [[(f"at the peak of {ranks}: {rank.when}", "bytes"), *_parts(rank.at_peak)]]
    tables[0].append(("all of it", human_bytes(rank.peak)))
    if rank.phases:
        tables.append([("most in each part of the job", "bytes"), *_parts(rank.phases)])
    if rank.host:
        tables.append([("in the memory of the host", "bytes"), *_parts(rank.host)])
    if rank.traffic:
        sent = [
            (f"{one.operation} over the {_GROUPS[one.group]}", f"{one.count:,}", human_bytes(one.bytes))
            for one in rank.traffic
        ]
        tables.append([("communicated in a step", "count", "bytes of tensors"), *sent])
    if rank.forward_operations:
        counts = (("forward", rank.forward_operations), ("backward", rank.backward_operations))
        tables.append([("floating-point operations of a step", ""), *((what, f"{n:.3e}") for what, n in counts)])
    return tables


_GROUPS = {"tensor": "tensor-parallel ranks", "data": "data-parallel ranks", "all": "all ranks"}


def _parts(parts: tuple[Part, ...]) -> list[tuple[str, ...]]:
    return [(part.what, human_bytes(part.bytes)) for part in parts if part.bytes >= 1024]


def _ranks(ranks: tuple[int, ...]) -> str:
    if len(ranks) == 1:
        return f"TP rank {ranks[0]}"
    if ranks == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"TP ranks {ranks[0]} to {ranks[-1]}"
    return f"TP ranks {', '.join(map(str, ranks))}"
