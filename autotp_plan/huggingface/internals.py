"""The private names of transformers, accelerate and PEFT. No other file says them.

Each function states what it relies on and raises MissingDependencyError when it is gone;
`tests/huggingface/test_canaries.py` asserts all of it in a second.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from autotp_plan.schemas.upstream import private, replaced

_TRANSFORMERS = "transformers"
_ACCELERATE = "accelerate"


# transformers: models


def model_of_config(architecture: type[Any], config: Any, **options: Any) -> Any:
    """A model of the class `architecture`, with random weights.

    Relies on `PreTrainedModel._from_config(config, **options)`, which `AutoModel.from_config` calls.
    """
    return private(architecture, "_from_config", _TRANSFORMERS, "building a model from its config")(config, **options)


def is_capturing(what: str) -> bool:
    """Whether a forward collects `what` (`hidden_states`) of its layers now, by hooks.

    Relies on `transformers.utils.output_capturing._active_collector`.
    """
    from transformers.utils import output_capturing

    collector = private(output_capturing, "_active_collector", _TRANSFORMERS, "hidden states of sharded sequences")
    return what in (collector.get() or ())


FEATURES_OF_IMAGES = "_deepstack_process"
"""The method by which a model adds features of images to what its first layers give.

It takes the hidden states `(batch, tokens, hidden size)`, a mask `(batch, tokens)`, and a row of features for each
token of the mask.
"""


@contextmanager
def without_zero_init() -> Iterator[None]:
    """While active, transformers does not let ZeRO 3 partition a model as it builds it.

    It would, once TrainingArguments with ZeRO 3 exist; here the engine partitions the shards. Relies on
    `transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref`.
    """
    from transformers.integrations import deepspeed as settings

    name = "_hf_deepspeed_config_weak_ref"
    private(settings, name, _TRANSFORMERS, "building a model that ZeRO 3 does not partition")
    with replaced(settings, name, None):
        yield


def stays_float32(model: Any, dtype: Any) -> Callable[[str], bool]:
    """Whether a tensor of `model`, by its name, is float32 although the model is of another `dtype`.

    Relies on `PreTrainedModel._get_dtype_plan(dtype)`, a dict of dtypes by pattern, which are all float32, and on
    `core_model_loading.build_glob_alternation(patterns)`, whose first result is one regex for all of them.
    """
    from transformers import core_model_loading

    used_for = "the dtypes of a model's tensors"
    patterns = list(private(model, "_get_dtype_plan", _TRANSFORMERS, used_for)(dtype))
    if not patterns:
        return lambda name: False
    regex = private(core_model_loading, "build_glob_alternation", _TRANSFORMERS, used_for)(patterns)[0]
    return lambda name: regex.search(name) is not None


def mark_as_loaded(model: Any) -> None:
    """Let `init_weights` and `post_init` keep the weights of a model that is loaded, as after `from_pretrained`.

    Relies on `_is_hf_initialized` of modules, as `compute_buffers` does.
    """
    for module in model.modules():
        module._is_hf_initialized = True


def compute_buffers(model: Any) -> None:
    """Compute the buffers of `model` once more, as `from_pretrained` does when it has built a model in its dtype.

    Its parameters are not touched. Relies on `PreTrainedModel._init_weights(module)`, which computes buffers too; and
    on `_is_hf_initialized` of modules and parameters, which keeps `initialize_weights` from doing them again.
    """
    private(model, "_init_weights", _TRANSFORMERS, "the values of a model's buffers")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()


def with_sequences_unpacked() -> AbstractContextManager[None]:
    """While active, models take each row of a batch for one sequence, and do not look for several in its positions.

    They would read them, which tensors without data do not have, and make a mask of every pair of tokens. Relies on
    `transformers.masking_utils.find_packed_sequence_indices` being looked up when it is called; None says "one".
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    private(masking_utils, name, _TRANSFORMERS, "running a model without data")
    return replaced(masking_utils, name, lambda position_ids: None)


def tensor_parallel_plan(model: Any) -> dict[str, str]:
    """The model's `tp_plan`: style by module or parameter, with `*` for numbers; empty when it has none.

    For a class that is not transformers' own the plans of its config, its class and the model are put together.

    Relies on `_tp_plan`, a dict or None.
    """
    if not type(model).__module__.startswith("transformers."):
        found: dict[Any, Any] = {}
        of_config = getattr(getattr(model, "config", None), "base_model_tp_plan", None)
        for plan in (of_config, getattr(type(model), "_tp_plan", None), getattr(model, "_tp_plan", None)):
            found.update(plan if isinstance(plan, Mapping) else {})
        return {str(key): str(style) for key, style in found.items()}
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return {}
    found = private(model, "_tp_plan", _TRANSFORMERS, "planning a model without a preset") or {}
    return {str(key): str(style) for key, style in found.items()}


def unused_names(model: Any) -> list[str]:
    """Regexes of names, to be searched for, of tensors that checkpoints hold and that `model` has no parameter for.

    Such are the layers that predict more than one token. transformers drops them when it loads, in silence. Relies on
    `_keys_to_ignore_on_load_unexpected`, a collection or None, which holds those of the models inside it too.
    """
    used_for = "the tensors of a checkpoint that a model does not use"
    return sorted(private(model, "_keys_to_ignore_on_load_unexpected", _TRANSFORMERS, used_for) or ())


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """How tensors of a checkpoint become one parameter.

    Attributes:
        sources: parts of the tensors' names.
        targets: parts of the parameter's name.
        operations: the names of the operations, each with its dim, None where it has none.
        exchanges: whether the last two of three dimensions are exchanged where shapes differ.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[tuple[str, int | None], ...]
    exchanges: bool = False


_EXCHANGE = [("Transpose", {"dim0": 1, "dim1": 2, "check_dims": True})]


def checkpoint_conversions(model: Any) -> tuple[list[Conversion], Callable[[str], str]]:
    """How a checkpoint's tensors become `model`'s parameters, and the name on disk of a tensor that is only renamed.

    Relies on `conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)`, and in `core_model_loading` on
    `WeightConverter`, `PrefixChange`, `reverse_transform` and `rename_source_key` (`apply_renamings` came with 5.21).
    """
    from transformers import conversion_mapping, core_model_loading

    used_for = "planning a model without a preset"
    table = private(conversion_mapping, "get_model_conversion_mapping", _TRANSFORMERS, used_for)
    converter = private(core_model_loading, "WeightConverter", _TRANSFORMERS, used_for)
    prefix = private(core_model_loading, "PrefixChange", _TRANSFORMERS, used_for)
    found = [one for one in table(model, add_legacy=False) if not isinstance(one, prefix)]
    back = [
        private(one, "reverse_transform", _TRANSFORMERS, used_for)()
        for one in reversed(found)
        if not isinstance(one, converter)
    ]
    conversions = [
        Conversion(
            sources=tuple(one.source_patterns),
            targets=tuple(one.target_patterns),
            operations=tuple((type(step).__name__, getattr(step, "dim", None)) for step in one.operations),
            exchanges=[(type(step).__name__, vars(step)) for step in one.operations] == _EXCHANGE,
        )
        for one in found
        if isinstance(one, converter)
    ]

    def on_disk(name: str) -> str:
        for renaming in back:
            name, _ = private(renaming, "rename_source_key", _TRANSFORMERS, used_for)(name)
        return name

    return conversions, on_disk


# transformers: Trainer


def count_tokens_with(trainer: Any, gather: Callable[[Any], Any]) -> None:
    """Let a Trainer sum the tokens of all ranks that `gather` gathers, in `num_input_tokens_seen`.

    Relies on `Trainer._track_num_input_tokens(inputs)` calling `self.accelerator.gather`.
    """
    count = private(trainer, "_track_num_input_tokens", _TRANSFORMERS, "Trainer's number of tokens")

    def counted(inputs: Any) -> None:
        with replaced(trainer.accelerator, "gather", gather):
            count(inputs)

    trainer._track_num_input_tokens = counted


def count_items_of_one_rank(trainer: Any, tp_size: int) -> None:
    """Let a Trainer that does not sum the labels of all ranks count those of its own batch.

    It divides by the number of TP ranks whether it has summed over them or not. Relies on
    `Trainer._get_num_items_in_batch(batches, device)`.
    """
    count = private(trainer, "_get_num_items_in_batch", _TRANSFORMERS, "Trainer's loss")

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = count(*args, **kwargs)
        return found if found is None or trainer.args.average_tokens_across_devices else found * tp_size

    trainer._get_num_items_in_batch = counted


# accelerate


def prepare_engine_with(accelerator: Any, initialize: Callable[..., Any]) -> None:
    """Let `accelerator.prepare` make its engine with `initialize` in the place of `deepspeed.initialize`.

    Relies on `Accelerator._prepare_deepspeed(*args)` looking up `deepspeed.initialize` when it is called, and calling
    it with `model`, `config_params` and other keywords.
    """
    import deepspeed

    prepare = private(accelerator, "_prepare_deepspeed", _ACCELERATE, "Hugging Face's Trainer")

    def prepare_with(*args: Any) -> Any:
        with replaced(deepspeed, "initialize", initialize):
            return prepare(*args)

    accelerator._prepare_deepspeed = prepare_with


def gathering_objects_with(
    of_each: Callable[[Callable[[Any], Any], Any], Any],
) -> AbstractContextManager[None]:
    """While active, accelerate gathers Python objects by `of_each(gather, objects)`.

    Relies on `accelerate.accelerator.gather_object(objects)`, which `gather_for_metrics` calls.
    """
    from accelerate import accelerator

    gather = private(accelerator, "gather_object", _ACCELERATE, "the results of an evaluation")
    return replaced(accelerator, "gather_object", lambda objects: of_each(gather, objects))


@contextmanager
def counting_with(
    accelerator: Any,
    module: Any,
    num_processes: int,
    process_index: int,
    gather: Callable[[Any], Any],
    of_each: Callable[[Callable[[Any], Any], Any], Any],
) -> Iterator[None]:
    """While active, `module` and its Accelerator count `num_processes`, of which this is `process_index`.

    Relies on `Accelerator.num_processes` and `process_index`, properties that nothing sets, and on `gather` and
    `gather_object` of `module`, a trainer of TRL.

    Args:
        accelerator: the Accelerator.
        module: what has imported `gather` and `gather_object` of accelerate.
        num_processes: the number of processes.
        process_index: the number of this one.
        gather: in the place of both `gather`.
        of_each: called as `of_each(gather_object, objects)` in the place of `gather_object`.
    """
    used_for = "TRL's trainers that generate"
    objects = private(module, "gather_object", "trl", used_for)
    private(module, "gather", "trl", used_for)
    with (
        replaced(type(accelerator), "num_processes", num_processes),
        replaced(type(accelerator), "process_index", process_index),
        replaced(accelerator, "gather", gather),
        replaced(module, "gather", gather),
        replaced(module, "gather_object", lambda given: of_each(objects, given)),
    ):
        yield


def keep_rows_of(trainer: Any, number: int) -> None:
    """Let a trainer of TRL print and write a table of its last `number` completions.

    Relies on `_logs`, a dict of deques and of dicts of deques, which are made for `args.generation_batch_size`.
    """
    logs = private(trainer, "_logs", "trl", "the completions that TRL logs")
    for key, kept in logs.items():
        if isinstance(kept, deque):
            logs[key] = deque(kept, maxlen=number)


# PEFT


def register_lora_layers(config: Any, layers: Mapping[type[Any], type[Any]]) -> None:
    """Tell PEFT which adapter goes with which class of layers. Relies on `LoraConfig._register_custom_module(dict)`."""
    private(config, "_register_custom_module", "peft", "LoRA on tensor-parallel layers")(dict(layers))


def replace_adapter_injection(
    check: Callable[[Any, Any], None],
    inject: Callable[..., None],
    loading: Callable[[], AbstractContextManager[None]],
) -> None:
    """Let PEFT call `check(model, config)` before it wraps a model, and `inject(original, tuner, model, name, ...)`.

    `inject` calls `original(tuner, model, name, ...)`. Inside `loading()` an adapter is loaded: PEFT asks the model for
    its state dict then, of which it reads the names. Relies on `PeftModel.__init__(model, peft_config, ...)` and
    `BaseTuner.inject_adapter(model, adapter_name, ...)`, through which every way to an adapter goes, and on
    `PeftModel.load_adapter`. Does nothing the second time.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    original: Any = private(BaseTuner, "inject_adapter", "peft", "LoRA on tensor-parallel layers")
    begin: Any = PeftModel.__init__
    if getattr(original, "knows_shards", False):
        return

    @functools.wraps(original)
    def inject_adapter(tuner: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        inject(original, tuner, model, adapter_name, *args, **kwargs)

    @functools.wraps(begin)
    def checked(self: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        check(model, peft_config)
        begin(self, model, peft_config, *args, **kwargs)

    load: Any = PeftModel.load_adapter

    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        with loading():
            return load(self, *args, **kwargs)

    PeftModel.load_adapter = load_adapter
    inject_adapter.knows_shards = True  # type: ignore[attr-defined]
    BaseTuner.inject_adapter = inject_adapter
    PeftModel.__init__ = checked


# configs


def attention_of(config: Any) -> str | None:
    """Which implementation of attention a config names. Relies on `PretrainedConfig._attn_implementation`."""
    return getattr(config, "_attn_implementation", None)


# datasets


def ranks_a_stream_is_split_for(data: Any) -> int | None:
    """For how many ranks `datasets.distributed.split_dataset_by_node` has split a stream; None when it has not.

    Relies on `datasets.IterableDataset._distributed`, None or an object with `world_size`.
    """
    import sys

    datasets = sys.modules.get("datasets")  # a stream of another library is none of its own
    if datasets is None or not isinstance(data, datasets.IterableDataset):
        return None
    split = private(data, "_distributed", "datasets", "giving each data-parallel rank its share of a stream")
    return None if split is None else int(split.world_size)
