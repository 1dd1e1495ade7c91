"""A transformers model without weights, from its config: for its names, shapes and dtypes, or to be filled with shards.

torch and transformers are imported when it is called, never before: planning from a checkpoint does without them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from autotp_plan.huggingface.internals import compute_buffers, model_of_config, stays_float32, without_zero_init
from autotp_plan.schemas.errors import AutoTPError, CheckpointError, Fault, MissingDependencyError
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, QUANTIZATION, read_config

SAME_ARCHITECTURE = {"kimi_k2": "deepseek_v3"}
"""Model types that transformers does not have, and whose published code is that of one that it has."""

_LARGE = 2**27
"""Number of elements from which on a new tensor is a parameter, not a buffer."""


def build_model(
    folder: Path,
    architecture: str | None = None,
    *,
    on_meta: Literal["all", "parameters", "nothing"] = "parameters",
    **options: Any,
) -> Any:
    """The transformers model of the config.json in `folder`, with random weights or none.

    Args:
        folder: a folder with a config.json.
        architecture: a class of transformers; None for the one that the config names. Where transformers has no such
            class, the causal language model of the config's `model_type`.
        on_meta: `all` for shapes and dtypes alone, which are then those of checkpoints; `parameters` for a model that
            is filled with weights, whose buffers are real; `nothing` for a model with random weights.
        options: for transformers, such as `attn_implementation="sdpa"`, or a `dtype` that is not the config's.

    Returns:
        A `transformers.PreTrainedModel` whose weights are tied as its config says. Its tensors have the dtypes that
        `from_pretrained` gives them, and its buffers the values.

    Raises:
        CheckpointError: transformers cannot build a model from the config, or only by running code that lies beside it.
        MissingDependencyError: transformers or torch is not installed, or transformers is not as it is needed.
    """
    config = read_config(folder) or {}
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            Fault(
                code="transformers-missing",
                what="shapes from a bare config.json need transformers",
                where=str(folder / CONFIG_NAME),
                got=f"no module named {error.name!r}",
                expected="transformers, accelerate and torch, or a folder with safetensors files",
                next="pip install 'autotp-plan[train]', or give the checkpoint folder: its headers are enough",
            )
        ) from None
    places: dict[str, contextlib.AbstractContextManager[Any]] = {
        "all": torch.device("meta"),
        "parameters": _parameters_on_meta(),
        "nothing": contextlib.nullcontext(),
    }
    try:
        model_config = _config_of(transformers, folder, config.get("model_type"))
        assumed = torch.bfloat16 if _forget_quantization(model_config) else torch.float32
        options = {"dtype": _dtype(model_config) or assumed, **options}
        named = getattr(transformers, architecture or (config.get("architectures") or [""])[0], None)
        with places[on_meta], without_zero_init():
            model: Any
            if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
                model = model_of_config(named, _part_for(named, model_config), **options)
            else:
                multimodal = type(model_config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
                causal = type(model_config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or not multimodal
                automatic = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
                model = automatic.from_config(model_config, trust_remote_code=False, **options)
        model.tie_weights()
        if on_meta != "all":
            compute_buffers(model)
        _keep_in_float32(model, options["dtype"])
    except AutoTPError:
        raise
    except Exception as error:  # transformers and its validation of configs raise errors of many kinds
        if "trust_remote_code" in str(error):
            raise CheckpointError(_remote_code(folder, config)) from None
        if config.get("model_type") not in transformers.CONFIG_MAPPING:
            raise CheckpointError(_unknown_type(folder, config, transformers.__version__)) from None
        raise CheckpointError(
            Fault(
                code="unbuildable-config",
                what="transformers cannot build a model from this config",
                where=str(folder / CONFIG_NAME),
                got=f"{type(error).__name__}: {error}",
                expected=f"the config.json of {architecture or 'a causal language model that transformers knows'}",
                next="correct the config; or, to plan, give a folder with safetensors files; to train, give the model "
                "yourself: plan.load_model(path, model=module_on_meta)",
            )
        ) from None
    return model


def _config_of(transformers: Any, folder: Path, model_type: Any) -> Any:
    """The transformers config in `folder`."""
    known = SAME_ARCHITECTURE.get(model_type) if isinstance(model_type, str) else None
    if known is None:
        return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return transformers.CONFIG_MAPPING[known].from_dict({**values, "model_type": known})


def _forget_quantization(model_config: Any) -> bool:
    """Make a config that of a model with plain weights, which it gets; returns whether it was not."""
    quantized = [
        one for one in (model_config, getattr(model_config, "text_config", None)) if hasattr(one, QUANTIZATION)
    ]
    for one in quantized:
        delattr(one, QUANTIZATION)
    return bool(quantized)


def _part_for(architecture: type[Any], model_config: Any) -> Any:
    """The config, or the one inside it that is of the kind that a class takes: that of a language model alone."""
    kind = getattr(architecture, "config_class", None)
    if kind is None or isinstance(model_config, kind):
        return model_config
    inner = (getattr(model_config, key, None) for key in getattr(model_config, "sub_configs", ()))
    return next((one for one in inner if isinstance(one, kind)), model_config)


def names_a_dtype(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says of which dtype the model is, for itself or for its text model."""
    text = config.get("text_config")
    return any(
        one.get(key) is not None
        for one in (config, text if isinstance(text, Mapping) else {})
        for key in ("dtype", "torch_dtype")
    )


def parameters_and_buffers(module: Any) -> Iterator[tuple[str, Any]]:
    """Every parameter of `module` under every name it has, and every buffer that checkpoints hold."""
    yield from module.named_parameters(remove_duplicate=False)
    buffers = {
        f"{prefix}.{leaf}" if prefix else leaf: buffer
        for prefix, inside in module.named_modules()
        for leaf, buffer in inside.named_buffers(recurse=False)
    }
    saved = module.state_dict(keep_vars=True).keys() if buffers else ()
    yield from ((name, buffer) for name, buffer in buffers.items() if name in saved)


def _dtype(model_config: Any) -> Any:
    """The dtype that a transformers config names; where it names none, that of its text model; None for neither."""
    found = getattr(model_config, "dtype", None)
    return found if found is not None else getattr(getattr(model_config, "text_config", None), "dtype", None)


def _remote_code(folder: Path, config: Mapping[str, Any]) -> Fault:
    """The fault of a model whose code is not part of transformers."""
    mapped = config.get("auto_map")
    files = sorted({str(one) for one in mapped.values()}) if isinstance(mapped, Mapping) else []
    return Fault(
        code="remote-code",
        what="the model's code is not part of transformers, and code from a checkpoint is never run",
        where=str(folder / CONFIG_NAME),
        got=f"model_type {config.get('model_type')}" + (f", with code in {', '.join(files)}" if files else ""),
        expected="a model that transformers has",
        next="to plan, give a folder with safetensors files and a spec file for its weights (--preset none --spec FILE)"
        "; to train, import the code and give the model yourself: plan.load_model(path, model=module_on_meta)",
    )


def _unknown_type(folder: Path, config: Mapping[str, Any], version: str) -> Fault:
    """The fault of a model that the installed transformers does not have."""
    return Fault(
        code="unknown-model-type",
        what="transformers does not have this model",
        where=str(folder / CONFIG_NAME),
        got=f"model_type {config.get('model_type')}, and transformers {version}",
        expected="a model_type of the installed transformers",
        next="install a transformers that has it; or, to plan, give a folder with safetensors files and a spec file "
        "for its weights (--preset none --spec FILE)",
    )


def _keep_in_float32(model: Any, dtype: Any) -> None:
    """Give tensors that are float32 whatever the model's dtype that dtype, as in checkpoints."""
    import torch

    stays = stays_float32(model, dtype)
    for name, tensor in parameters_and_buffers(model):
        if tensor.is_floating_point() and stays(name):
            tensor.data = tensor.data.to(torch.float32)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While active, new modules have parameters on meta and real buffers.

    accelerate moves a parameter to meta only once it is made. The fused experts of one layer can be 30 GB, so tensors
    of many elements are made on meta at once. Random numbers for what is on meta are not drawn: torch would take half
    a millisecond for each parameter.
    """
    import torch
    from accelerate import init_empty_weights
    from torch.overrides import TorchFunctionMode

    makers = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
    fillers = {torch.Tensor.normal_, torch.Tensor.uniform_}

    class LargeOnMeta(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in fillers and args[0].is_meta:
                return args[0]
            if func in makers:
                empty = func(*args, **{**kwargs, "device": "meta"})
                if empty.numel() >= _LARGE:
                    return empty
            return func(*args, **kwargs)

    with init_empty_weights(include_buffers=False), LargeOnMeta():
        yield
