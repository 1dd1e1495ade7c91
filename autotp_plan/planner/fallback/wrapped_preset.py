"""A model around a language model that has a preset: where the language model is, and its preset for that place.

The wrappers in `wrappers.json` are planned from headers alone. Of any other one transformers says what there is to
know: the model on meta says where its language model and its head are, and the conversion tables say the names on disk.
All else is replicated. What is compiled from that must be proven before it is used.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from autotp_plan.huggingface.disk_names import known_disk_names, ties
from autotp_plan.planner.fallback.unused_tensors import with_unused_tensors
from autotp_plan.planner.model.model_input import ModelInput
from autotp_plan.planner.rules.preset_files import AUTO, find_preset
from autotp_plan.planner.wrappers.wrapper import Wrapper, preset_of_text, text_config
from autotp_plan.schemas.errors import CheckpointError, MissingDependencyError
from autotp_plan.schemas.spec import SpecFile


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WrappedPreset:
    """A preset for the language model inside of a wrapper."""

    wrapper: Wrapper
    preset: SpecFile


def wrapped_preset(model: ModelInput) -> WrappedPreset | None:
    """The preset of the language model inside of `model`.

    Args:
        model: as it was given.

    Returns:
        None for a model without a language model inside, and where that has no preset, or one that cannot be placed.

    Raises:
        CompileError: the checkpoint's tensors become parameters in a way that byte ranges cannot express.
    """
    if not model.model_type or not (not model.is_folder or text_config(model.config or {})):
        return None
    try:
        module = model.module
    except (CheckpointError, MissingDependencyError):
        return None
    wrapper = wrapper_of(module, model.model_type)
    preset = None if wrapper is None else find_preset(AUTO, preset_of_text(wrapper.text_type), [])
    placed = None if wrapper is None or preset is None else wrapper.place(preset)
    if wrapper is None or placed is None:
        return None
    names = known_disk_names(module, model.where)
    text = module.config.get_text_config(decoder=True).to_dict()
    placed = dataclasses.replace(
        placed,
        defaults={**placed.defaults, **{key: value for key, value in text.items() if value is not None}},
        renamed_tensors=names.renamed,
        assembled_tensors=names.assembled,
        transposed_tensors=dict(names.transposed),
        renamed_prefixes={},
        tied=tuple(ties(module)),
        ignored_tensors=(),
        ignored_layers={},
    )
    return WrappedPreset(wrapper=wrapper, preset=with_unused_tensors(placed, model))


def wrapper_of(module: Any, model_type: str) -> Wrapper | None:
    """Where `module` holds a language model and its head; None where it does not."""
    text = module.config.get_text_config(decoder=True) if hasattr(module.config, "get_text_config") else module.config
    if text is module.config or not hasattr(module, "get_decoder"):
        return None
    names = {id(one): name for name, one in module.named_modules()}
    decoder, head = module.get_decoder(), module.get_output_embeddings()
    inside, head_name = names.get(id(decoder)), names.get(id(head))
    if not inside or not head_name:
        return None
    if head_name.startswith(f"{inside}."):  # a causal language model
        decoder = decoder.get_decoder()
        inside = names.get(id(decoder), inside)
    head_dim = next((one.head_dim for one in decoder.modules() if type(getattr(one, "head_dim", None)) is int), None)
    return Wrapper(
        model_type=model_type,
        language_model=inside,
        head=head_name,
        text_type=text.model_type,
        symbols={} if head_dim is None else {"head_dim": [head_dim]},
    )
