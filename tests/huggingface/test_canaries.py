"""Every private name of transformers, accelerate and PEFT that is relied on is there, and as it was.

A new version of one of them fails here first, in a second, and says what would break.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.canaries import Canary, problem, takes, uses

TABLES = "planning a model without a preset"
LOADING = "transformers.core_model_loading"
TRAINER = "Hugging Face's Trainer"


def zero_3_is_read_from_it(_: Any) -> bool:
    from transformers.integrations import deepspeed

    class Config:
        def is_zero3(self) -> bool:
            return True

    config = Config()
    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = lambda: config
    try:
        return bool(deepspeed.is_deepspeed_zero3_enabled())
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def says_what_is_collected(collector: Any) -> bool:
    from autotp_plan.huggingface.internals import is_capturing

    before = is_capturing("hidden_states")
    token = collector.set({"hidden_states": []})
    try:
        return not before and is_capturing("hidden_states") and not is_capturing("attentions")
    finally:
        collector.reset(token)


def loss_is_of_causal_lms(loss: Any) -> bool:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
        )
        return AutoModelForCausalLM.from_config(config).loss_function is loss


def float32_is_kept_by_pattern(_: Any) -> bool:
    from transformers import DeepseekV3ForCausalLM, GptOssForCausalLM

    def plan_of(cls: Any, dtype: Any) -> Any:
        model = SimpleNamespace(
            _keep_in_fp32_modules=cls._keep_in_fp32_modules,
            _keep_in_fp32_modules_strict=cls._keep_in_fp32_modules_strict,
        )
        return cls._get_dtype_plan(model, dtype)

    strict = {"e_score_correction_bias": torch.float32}
    return (
        plan_of(DeepseekV3ForCausalLM, torch.bfloat16) == strict == plan_of(DeepseekV3ForCausalLM, torch.float16)
        and plan_of(GptOssForCausalLM, torch.bfloat16) == plan_of(DeepseekV3ForCausalLM, torch.float32) == {}
        and set(plan_of(GptOssForCausalLM, torch.float16).values()) == {torch.float32}
    )


def buffers_are_computed_once_more(_: Any) -> bool:
    from transformers import CodeGenConfig, CodeGenModel

    from autotp_plan.huggingface.internals import compute_buffers

    model = CodeGenModel(CodeGenConfig(n_embd=32, n_head=4, n_layer=1, n_positions=8, rotary_dim=4, vocab_size=8))
    before = model.wte.weight.detach().clone()
    buffer = model.h[0].attn.embed_positions
    right = buffer.clone()
    buffer.zero_()
    compute_buffers(model)
    return torch.equal(buffer, right) and torch.equal(model.wte.weight, before)


def mixtral_stacks_experts(table: Any) -> bool:
    from transformers import AutoModelForCausalLM, MixtralConfig

    from autotp_plan.huggingface.internals import checkpoint_conversions

    with torch.device("meta"):
        config = MixtralConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
            vocab_size=8, num_local_experts=2,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    conversions, on_disk = checkpoint_conversions(model)
    operations = {conversion.operations for conversion in conversions}
    stacked = (("MergeModulelist", 0),), (("MergeModulelist", 0), ("Concatenate", 1))
    return operations >= set(stacked) and on_disk("lm_head.weight") == "lm_head.weight"


def modules_are_registered(_: Any) -> bool:
    from peft import LoraConfig

    config = LoraConfig()
    config._register_custom_module({int: str})
    return config._custom_modules == {int: str}


def multi_token_layers_are_named(_: Any) -> bool:
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3NextConfig(num_hidden_layers=1, num_experts=2, vocab_size=8))
    return model._keys_to_ignore_on_load_unexpected == {"^mtp.*"}


def streams_say_how_they_are_split(split: Any) -> bool:
    import datasets

    from autotp_plan.huggingface.internals import ranks_a_stream_is_split_for

    stream = datasets.IterableDataset.from_generator(lambda: iter([{"n": 0}]))
    split_for = ranks_a_stream_is_split_for
    return split_for(stream) is None and split_for(split(stream, rank=0, world_size=3)) == 3


CANARIES = [
    Canary("transformers:PreTrainedModel._from_config", "building a model from its config", uses("dtype")),
    Canary("transformers.integrations.deepspeed:_hf_deepspeed_config_weak_ref",
           "a model under TrainingArguments with ZeRO 3: transformers would partition it before it is sharded",
           zero_3_is_read_from_it),
    Canary("transformers.utils.output_capturing:_active_collector",
           "hidden states of layers in a step with sequence parallelism: each rank's would be a part of them",
           says_what_is_collected),
    Canary("transformers.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLTextModel._deepstack_process",
           "features of images between layers, with sequence parallelism: each rank would add those of other tokens",
           takes("hidden_states", "visual_pos_masks", "visual_embeds")),
    Canary("transformers:PreTrainedModel._get_dtype_plan",
           "tensors kept in float32: they would be planned and loaded in bf16", float32_is_kept_by_pattern),
    Canary(f"{LOADING}:build_glob_alternation", "tensors kept in float32: which ones they are",
           lambda build: build(["a.*.b", "c"])[0].search("x.a.0.b")),
    Canary("transformers:PreTrainedModel._init_weights", "the values of buffers", buffers_are_computed_once_more),
    Canary("transformers:PreTrainedModel._initialize_weights", "the values of buffers, and parameters that stay",
           uses("_is_hf_initialized", "_init_weights")),
    Canary("transformers:PreTrainedModel._tp_plan", TABLES, lambda plan: plan is None or isinstance(plan, dict)),
    Canary("transformers.conversion_mapping:get_model_conversion_mapping", TABLES, takes("model", "add_legacy")),
    Canary(f"{LOADING}:WeightConverter", TABLES, mixtral_stacks_experts),
    Canary(f"{LOADING}:PrefixChange", TABLES),
    Canary(f"{LOADING}:WeightRenaming.rename_source_key", TABLES, takes("source_key")),
    Canary(f"{LOADING}:WeightRenaming.reverse_transform", TABLES),
    Canary("transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected",
           "tensors of multi-token prediction: they would have to be described by hand", multi_token_layers_are_named),
    Canary("transformers.loss.loss_utils:ForCausalLMLoss",
           "the vocabulary-parallel loss: logits would be gathered again, in silence", loss_is_of_causal_lms),
    Canary("transformers.pytorch_utils:Conv1D", "sharding GPT-2's layers",
           lambda cls: tuple(cls(3, 2).weight.shape) == (2, 3)),
    Canary("transformers:Trainer._get_num_items_in_batch", f"{TRAINER}: the loss without average_tokens_across_devices",
           lambda function: takes("batch_samples", "device")(function)
           and uses("average_tokens_across_devices", "get_tp_size")(function)),
    Canary("transformers:Trainer._track_num_input_tokens", f"{TRAINER}: the number of tokens", uses("gather")),
    Canary("transformers.masking_utils:find_packed_sequence_indices", "running a model without data: its masks",
           takes("position_ids")),
    Canary("accelerate.accelerator:Accelerator._prepare_deepspeed", f"{TRAINER}: the batch size of its engine",
           uses("initialize", "config_params")),
    Canary("accelerate.accelerator:gather_object", f"{TRAINER}: results of an evaluation that are Python objects"),
    Canary("accelerate.accelerator:Accelerator.gather_for_metrics", f"{TRAINER}: the results of an evaluation",
           lambda function: takes("input_data", "use_gather_object")(function)
           and uses("gather", "gather_object")(function)),
    Canary("accelerate.accelerator:Accelerator.get_state_dict", f"{TRAINER}: save_model", takes("model", "unwrap")),
    Canary("datasets.distributed:split_dataset_by_node", "a stream that is split would be split once more",
           streams_say_how_they_are_split),
    Canary("peft:LoraConfig._register_custom_module", "LoRA on tensor-parallel layers", modules_are_registered),
    Canary("peft.tuners.tuners_utils:BaseTuner.inject_adapter", "LoRA by PEFT's own calls on a sharded model",
           takes("model", "adapter_name", "low_cpu_mem_usage")),
    *(
        Canary(f"trl.trainer.{file}_trainer:{file.upper()}Trainer", f"TRL's {file.upper()}Trainer: what it gathers",
               uses("gather", "gather_object", "num_processes" if file == "grpo" else "process_index", "_logs",
                    "generation_batch_size"))
        for file in ("grpo", "rloo")
    ),
    Canary("transformers:PretrainedConfig._attn_implementation", "comparing the attention of the ranks"),
    Canary("accelerate:Accelerator.process_index", "TRL's trainers that generate", lambda it: isinstance(it, property)),
    Canary("accelerate:Accelerator.num_processes", "TRL's trainers that generate", lambda it: isinstance(it, property)),
]  # fmt: skip


@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.name)
def test_private_names_are_as_they_were(canary: Canary) -> None:
    assert not problem(canary), problem(canary)


@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.name)
def test_a_name_that_moved_is_found(canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(*canary.owner())
    assert f"This breaks: {canary.breaks}." in problem(canary)


def test_a_name_that_moved_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    from autotp_plan.huggingface.internals import model_of_config
    from autotp_plan.schemas.errors import MissingDependencyError

    monkeypatch.delattr(PreTrainedModel, "_from_config")
    with pytest.raises(MissingDependencyError, match=r"transformers \d[\w.]* is not as autotp-plan needs it") as caught:
        model_of_config(PreTrainedModel, SimpleNamespace())
    assert "building a model from its config" in str(caught.value)
