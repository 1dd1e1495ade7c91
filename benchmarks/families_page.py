"""The page of all families: two tables that fit a screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.every_family import Outcome

WIDEST = 100
"""Characters of a reason."""

SENTENCES = (
    ("no answer within", "{}"),
    ("inference-stopped", "inference was given up: {}"),
    ("axial_pos_embds", "its tables of positions fix the width and the length of its sequences"),
    ("converted to type float without overflow", "its mask of attention does not exist in float64"),
    ("'[2, 12, 48]' is invalid", "its first forward replaces its attention by another, which the plan does not know"),
    ("unconsumed-column", "an output is sharded for which the plan's check finds no row-parallel weight in its layer"),
    ("timm", "transformers needs the package timm for its vision tower"),
    ("layer types producing a cache", "transformers builds it from no config: its own check of shared layers fails"),
    ("'ModuleList' object has no attribute 'weight'", "it reads several codebooks at once, not one sequence of tokens"),
    ("batch_size (0)", "its loss needs an image with every text"),
    ("in the DeepSpeed engine", "the plan is {}"),
    ("layer-without-parameter", "a weight is not in all of its layers, which the rules expect: {}"),
    ("Chunk", "one tensor on disk is several parameters, which a plan cannot express"),
    ("Interleave", "rows of gate and up lie in turns on disk, which a plan cannot express"),
    (
        "no layer whose inputs depend",
        "its experts are layers with weights of three dimensions, which inference does not try",
    ),
    ("mixer.out_proj.weight stays whole", "its mixer does not run with a part of its channels"),
    ("no-small-model: RuntimeError: The size of tensor", "in no small model of it the sizes of the models inside fit"),
    ("is too large", "no small model of it runs with fewer than 100 million parameters, as the proof needs"),
    ("unsupported-conversion", "byte ranges cannot express how its tensors on disk become parameters: {}"),
    ("no-small-model", "no small model of it runs: {}"),
    ("nothing-inferred", "no weights were found that can be sharded: {}"),
    ("wrong-inference", "the inferred plan proved wrong: {}"),
    ("wrong-tp-plan", "transformers' tp_plan of it is wrong: {}"),
    ("unbuildable-config", "transformers cannot build it: {}"),
    ("indivisible", "{}"),
    ("", "no small model could be run for the proof: {}"),
)
"""What is said of a refusal in whose code or message these words are; the first counts. `{}` is the message."""

WHOLE = (
    ("no expression of config keys", "its attention, whose sizes no keys of the config add up to"),
    ("indexer", "the indexer of its sparse attention, which chooses what the sharded attention reads"),
    ("minimax:", "its lightning attention: decay buffers, a value for each head, are saved, and no rule shards those"),
    ("at all sizes", "modules whose weights are divided in different ways at different sizes"),
    ("relative_pos_embeddings", "self-attention: its table of positions holds a row of all heads for each distance"),
    ("per_layer_projection", "the layer that mixes in the embeddings of each layer, whose input is not sharded"),
    ("", "{}: it does not run with a part of its heads or channels"),
)
"""What every rank computes, by words in the family and what inference notes; `{}` is the module."""


def page(outcomes: Sequence[Outcome], tp_size: int) -> str:
    """The text of docs/families.md."""
    import transformers

    counts = {kind: sum(o.outcome == kind for o in outcomes) for kind in dict.fromkeys(o.outcome for o in outcomes)}
    counted = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items(), key=lambda one: -one[1]))
    right = [one for one in outcomes if one.outcome == "right"]
    others = [one for one in outcomes if one.outcome != "right"]
    lines = [
        "# Every causal language model of transformers",
        "",
        f"Written by `python -m benchmarks.every_family --tp {tp_size}` with transformers {transformers.__version__}.",
        f"{len(outcomes)} families: {counted}.",
        "",
        "Each family's config (from `autotp_plan/plans/`, or else the default one) is planned, and the plan is proven",
        "on a small model, as `autotp-plan verify` does. `share` is the fraction of the model's bytes that the largest",
        f"rank holds, `compute` its fraction of a forward's operations (sharded evenly: {1 / tp_size:.2f}), `error`",
        "the largest in float64, `replicated` what every rank holds of the matrices, in percent of the model.",
        "",
        "| family | rules | share | compute | error | replicated |",
        "|---|---|---|---|---|---|",
        *(_right(one) for one in right),
    ]
    partly = [one for one in right if one.reason and (one.compute or 0) > _EVENLY / tp_size]
    if partly:
        lines += ["", "| family | computed by every rank |", "|---|---|", *(_whole(one) for one in partly)]
    if others:
        lines += ["", "| family | outcome | why |", "|---|---|---|", *(_other(one) for one in others)]
    return "\n".join(lines) + "\n"


def _right(one: Outcome) -> str:
    share = "" if one.share is None else f"{one.share:.2f}"
    compute = "" if one.compute is None else f"{one.compute:.2f}"
    error = "" if one.error is None else f"{one.error:.0e}"
    return f"| {one.family} | {one.rules} | {share} | {compute} | {error} | {brief(one.replicated)} |"


_EVENLY = 1.05
"""So many times its even share a rank computes where nothing is said."""


def _whole(one: Outcome) -> str:
    said = next(sentence for words, sentence in WHOLE if words in f"{one.family}: {one.reason}")
    module = one.reason.partition(" stays whole")[0].rpartition("*.")[2].removesuffix(".weight")
    return f"| {one.family} | {brief(said.format(module))} |"


def _other(one: Outcome) -> str:
    said = next(sentence for words, sentence in SENTENCES if words in f"{one.code}: {one.reason}")
    return f"| {one.family} | {one.outcome} | {brief(said.format(one.reason))} |"


def brief(text: str) -> str:
    """A reason that fits a table."""
    line = " ".join(text.split()).replace("|", "/").replace("*", "\\*")
    return line if len(line) <= WIDEST else line[: WIDEST - 3] + "..."
