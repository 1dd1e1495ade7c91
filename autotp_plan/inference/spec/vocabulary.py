"""Rules of tables with a row for each word: the embedding, the head, and others of the same words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from autotp_plan.inference.small.small_model import SmallModel
from autotp_plan.inference.spec.numbers import Numbers
from autotp_plan.inference.spec.region_rules import Rule
from autotp_plan.schemas.templates import pattern_of

_MANY_WORDS = 10_000
"""A table of so many rows is one of words, not of positions or types."""


def vocabulary_rules(models: Sequence[SmallModel], numbers: Numbers, second_names: Mapping[str, str]) -> list[Rule]:
    """The rules of tables with a row for each word.

    Args:
        models: small models.
        numbers: of their architecture.
        second_names: second names of parameters, with the first.
    """
    model = models[0].model
    rules: list[Rule] = []
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = models[0].embedding_and_head()
    bias = second_names.get(f"{names.get(id(head))}.bias")
    if bias is not None:  # it lies in a module around the head under its first name
        rules.append(
            {
                "patterns": [pattern_of(bias)],
                "partition_type": "shard",
                "shape": [["vocab_size"]],
                "indivisible": "uneven",
            }
        )
    for module, extra in (
        (embedding, {"partition_type": "vocab"}),
        (head, {"partition_type": "column", "gather_output": True}),
    ):
        if module is None or id(module) not in names or not hasattr(module, "weight"):
            continue
        name = names[id(module)]
        rows = tuple(one.model.get_submodule(name).weight.shape[0] for one in models)
        size = "vocab_size" if all(r == one.numbers.get("vocab_size") for r, one in zip(rows, models)) else -1
        shape: list[Any] = [[size] if size != -1 else -1, -1]
        tables = [name]
        if module is embedding:  # other modules that look up in the same table
            tables += [
                other
                for other, one in model.named_modules()
                if one is not module and type(one) is type(module) and one.weight is module.weight
            ]
        rule = {
            "patterns": [pattern_of(f"{table}.weight") for table in tables],
            **extra,
            "shape": shape,
            "indivisible": "uneven",
        }
        rules.append(rule)
    rules += _other_tables(models[0].model, embedding, numbers)
    return rules


def _other_tables(model: Any, embedding: Any, numbers: Numbers) -> Iterator[Rule]:
    """Rules for tables of other features of the same tokens, as large as the embedding."""
    if not hasattr(embedding, "weight"):
        return
    for name, table in model.named_modules():
        if type(table) is not type(embedding) or table.weight is embedding.weight:
            continue
        key = numbers.template(f"{name}.weight")
        if len(table.weight) == len(embedding.weight) and numbers.shapes[key][0] >= _MANY_WORDS:
            patterns = [pattern_of(key)]
            yield {"patterns": patterns, "partition_type": "vocab", "shape": [-1, -1], "indivisible": "uneven"}
