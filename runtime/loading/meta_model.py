"""The whole model without weights: built from its config, parameters on meta, buffers real."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode

from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan


def build_model(folder: Path, plan: Plan, *, on_meta: bool = True, **options: Any) -> nn.Module:
    """The transformers model of `folder`'s config with parameters on meta and real buffers.

    With `on_meta=False` the parameters are real too. `options` go to transformers, such as
    `attn_implementation="sdpa"`. Raises MismatchError when the config does not name a model class that transformers
    has.
    """
    import transformers

    model: Any
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        architecture = getattr(transformers, plan.model.architecture or "", None)
        with _parameters_on_meta() if on_meta else contextlib.nullcontext(), _without_zero_init():
            if isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel):
                model = architecture._from_config(config, **options)  # type: ignore[attr-defined]
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, **options)
    except (ValueError, KeyError, OSError) as error:
        raise MismatchError(
            Fault(
                what="transformers cannot build the plan's model",
                where=str(folder),
                got=f"{type(error).__name__}: {error}",
                expected=f"a config.json of {plan.model.architecture or 'a transformers model'}",
                next="give the model yourself: plan.load_model(path, model=module_on_meta)",
            )
        ) from None
    model.tie_weights()
    built: nn.Module = model
    return built


_LARGE = 2**27
_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
_FILLERS = {torch.Tensor.normal_, torch.Tensor.uniform_}


class _LargeOnMeta(TorchFunctionMode):
    """While active, new tensors of many elements are on meta: no buffer is that large, and a parameter is moved there
    only once it is made. Fused experts of one layer can be 30 GB. Random numbers for what is on meta are not drawn,
    which takes torch half a millisecond a parameter.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLERS and args[0].is_meta:
            return args[0]
        if func in _MAKERS:
            empty = func(*args, **{**kwargs, "device": "meta"})
            if empty.numel() >= _LARGE:
                return empty
        return func(*args, **kwargs)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        yield


@contextlib.contextmanager
def _without_zero_init() -> Iterator[None]:
    """While active, transformers does not partition a model as it builds it.

    It would, once TrainingArguments with ZeRO 3 exist; here the engine partitions what the plan has cut.
    """
    from transformers.integrations import deepspeed as settings

    kept = settings._hf_deepspeed_config_weak_ref
    settings.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        settings._hf_deepspeed_config_weak_ref = kept
