"""A preset is written for causal language models. Here it is fitted to the architecture's other classes.

These are the bare model, and those with a linear layer on top of it that scores sequences or tokens. They have the
same layers, under another prefix or none; in the place of `lm_head` a small head, which every rank has.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, TypeGuard

from autotp_plan.schemas.errors import CompileError, Fault
from autotp_plan.schemas.spec import Spec, SpecFile

_SCORING = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
"""Ends of the names of transformers' classes whose head is one linear layer."""
_HEAD_RULE = Spec(patterns=(r"(score|classifier|qa_outputs)\.weight$",), partition_type="skip")
_CAUSAL_HEAD = "lm_head"


def is_known_class(architecture: str | None) -> TypeGuard[str]:
    """Whether a class is one that a preset must be fitted to: a model without a head, or one that scores."""
    return _is_bare(architecture or "") or (architecture or "").endswith(_SCORING)


def fit_to_class(preset: SpecFile, architecture: str, names: Iterable[str], notes: list[str]) -> SpecFile:
    """The preset for another class of its architecture.

    Args:
        preset: the preset, for the causal language model.
        architecture: the class, for which `is_known_class` holds.
        names: the model's parameters, or a checkpoint's tensors.
        notes: what the user should know is added here.

    Raises:
        CompileError: the names are those of a model with a head, and the class has none.
    """
    scores = not _is_bare(architecture)
    base = preset.tied[0].to.partition(".")[0] if preset.tied else ""
    embedding = preset.tied[0].to.removeprefix(f"{base}.") if preset.tied else ""
    prefix = next((name.removesuffix(embedding) for name in names if f".{name}".endswith(f".{embedding}")), f"{base}.")
    if not scores and prefix:
        raise CompileError(_other_class(architecture, prefix + embedding, embedding))
    prefix = prefix or (f"{base}." if scores else "")
    vocabulary = [
        _HEAD_RULE if spec.patterns[0].startswith(_CAUSAL_HEAD) else spec
        for spec in preset.vocabulary_specs
        if scores or not spec.patterns[0].startswith(_CAUSAL_HEAD)
    ]
    if not scores:
        notes.append(
            f"config.json names {architecture}, a model without a head: for the causal language model, name that class "
            "in `architectures`."
        )
    renaming = _Renaming(f"{base}.", prefix)
    return dataclasses.replace(
        preset,
        layer_specs=renaming.rules(preset.layer_specs),
        vocabulary_specs=renaming.rules(vocabulary),
        module_attributes=renaming.rules(preset.module_attributes),
        modules=renaming.rules(preset.modules),
        tied=(),
        ignored_tensors=tuple(map(renaming.name, preset.ignored_tensors)),
        ignored_layers={renaming.name(name): count for name, count in preset.ignored_layers.items()},
        renamed_tensors={
            renaming.name(disk): renaming.name(name)
            for disk, name in preset.renamed_tensors.items()
            if not name.startswith(_CAUSAL_HEAD)
        },
        assembled_tensors={
            renaming.name(name): tuple(map(renaming.name, disks)) for name, disks in preset.assembled_tensors.items()
        },
        base_model_prefix=preset.base_model_prefix if prefix == f"{base}." else None,
    )


def _is_bare(architecture: str) -> bool:
    """Whether a class is a model without a head, such as `LlamaModel`."""
    return re.fullmatch(r"(?!.*(For|Head|PreTrained))\w+Model", architecture) is not None


def _other_class(architecture: str, got: str, expected: str) -> Fault:
    return Fault(
        code="tensors-of-another-class",
        what="the tensors are not named as those of the class in config.json",
        where="architectures",
        got=f"{architecture}, and a tensor {got}",
        expected=f"{expected}, or a class with a head",
        next="name the class whose checkpoint it is, such as "
        f"{architecture.removesuffix('Model')}ForCausalLM, in `architectures` of config.json",
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Renaming:
    """From one prefix of names to another, in names and in patterns for them."""

    old: str
    new: str

    def name(self, name: str) -> str:
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name

    def pattern(self, pattern: str) -> str:
        if pattern.startswith(re.escape(self.old)):
            return re.escape(self.new) + pattern.removeprefix(re.escape(self.old))
        if not self.new and pattern.startswith(r".*\."):
            return r"(.*\.)?" + pattern.removeprefix(r".*\.")
        return pattern

    def rules(self, rules: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(dataclasses.replace(rule, patterns=tuple(map(self.pattern, rule.patterns))) for rule in rules)
