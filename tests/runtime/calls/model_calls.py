"""Each method of PreTrainedModel, of its mixins and of nn.Module, as a call that gives something to compare.

A key is the name of the method, and after a colon how it is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import Module

Call = Callable[[Any, Path], Any]


def tokens() -> torch.Tensor:
    from tests.helpers.models import batch

    return batch(3)


def numbers(model: Any) -> list[float]:
    """The loss of a batch, and the gradient of a replicated weight."""
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    return [float(loss.detach()), *model.model.norm.weight.grad.double().tolist()]


def twice_the_loss(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    return 2 * F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def setting(name: str, value: Any) -> Call:
    def call(model: Any, _: Path) -> None:
        setattr(model, name, value)

    return call


def reading(*names: str) -> dict[str, Call]:
    """Calls that read a property or call a method without arguments, and compare what it says of itself."""

    def call(model: Any, name: str) -> Any:
        value = getattr(model, name)
        is_method = callable(value) and not isinstance(value, Module) and name != "loss_function"
        return plain(value() if is_method else value)

    return {name: lambda model, _, name=name: call(model, name) for name in names}  # type: ignore[misc]


def plain(value: Any) -> Any:
    """What of a value can be compared between two processes."""
    if isinstance(value, torch.Tensor):
        return value.detach().double().flatten().tolist()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return str(value) if isinstance(value, (torch.dtype, torch.device)) else type(value).__name__


def generated(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    return model.eval().generate(tokens()[:1, :4], max_new_tokens=4, min_new_tokens=4, **options)


def transition_scores(model: Any) -> Any:
    found = generated(model, do_sample=False, return_dict_in_generate=True, output_scores=True)
    return plain(model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True))


def new_model(model: Any, folder: Path) -> list[float]:
    """The numbers of another model of the class, which is not sharded."""
    return numbers(type(model).from_pretrained(model.config.name_or_path, dtype=torch.float32).train())


def lora(model: Any) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))


MODEL: dict[str, Call] = {
    **reading(
        "base_model", "can_generate", "device", "dtype", "dummy_inputs", "ep_plan", "fsdp_plan", "fsdp_size",
        "get_decoder", "get_encoder", "get_expanded_tied_weights_keys", "get_experts_implementation",
        "get_position_embeddings", "init_parallel_plans",
        "is_activation_checkpointing", "is_custom_code", "is_distributed_loading_by_transformers",
        "is_gradient_checkpointing", "is_remote_code", "loss_function", "pp_plan", "supports_context_parallel",
        "supports_pp_plan", "supports_tp_plan", "tp_plan", "tp_size", "use_kernels", "is_backend_compatible",
        "can_record_outputs", "dequantize", "init_weights", "initialize_weights", "post_init", "tie_weights",
        "enable_input_require_grads", "gradient_checkpointing_enable", "activation_checkpointing_enable",
        "num_parameters", "enable_peft_hotswap", "active_adapters", "enable_adapters", "disable_adapters",
        "get_adapter_state_dict", "get_memory_footprint", "train", "eval", "cuda",
    ),
    "activation_checkpointing_disable": lambda model, _: model.activation_checkpointing_disable(),
    "gradient_checkpointing_disable": lambda model, _: [
        model.gradient_checkpointing_enable(), model.gradient_checkpointing_disable()
    ],
    "gradient_checkpointing_enable: reentrant": lambda model, _: [
        model.enable_input_require_grads(), model.gradient_checkpointing_enable({"use_reentrant": True})
    ],
    "disable_input_require_grads": lambda model, _: [
        model.enable_input_require_grads(), model.disable_input_require_grads()
    ],
    "add_model_tags": lambda model, _: model.add_model_tags("tag") or list(model.model_tags),
    "dummy_inputs: forward": lambda model, _: float(model(**model.dummy_inputs).logits.double().square().sum()),
    "get_input_embeddings": lambda model, _: model.get_input_embeddings() is model.model.embed_tokens,
    "get_output_embeddings": lambda model, _: model.get_output_embeddings() is model.lm_head,
    "get_correct_attn_implementation": lambda model, _: model.get_correct_attn_implementation("sdpa"),
    "get_correct_experts_implementation": lambda model, _: model.get_correct_experts_implementation("eager"),
    "set_attn_implementation": lambda model, _: model.set_attn_implementation("eager"),
    "set_attn_implementation: flex": lambda model, _: model.set_attn_implementation("no_such"),
    "set_experts_implementation": lambda model, _: model.set_experts_implementation("eager"),
    "set_encoder": lambda model, _: model.set_encoder(model.model),
    "set_decoder": lambda model, _: model.set_decoder(copy.deepcopy(model.model.norm)),
    "set_input_embeddings": lambda model, _: model.set_input_embeddings(torch.nn.Embedding(256, 64)),
    "set_output_embeddings": lambda model, _: model.set_output_embeddings(torch.nn.Linear(64, 256)),
    "resize_token_embeddings": lambda model, _: model.resize_token_embeddings(300),
    "resize_position_embeddings": lambda model, _: model.resize_position_embeddings(128),
    "mark_tied_weights_as_initialized": lambda model, _: model.mark_tied_weights_as_initialized(None),
    "set_use_kernels": lambda model, _: model.set_use_kernels(True),
    "set_use_kernels: by the property": setting("use_kernels", True),
    "use_kernels: unset": setting("use_kernels", False),
    "loss_function: of one's own": setting("loss_function", twice_the_loss),
    "tp_plan: set": setting("tp_plan", {}),
    "get_compiled_call": lambda model, _: callable(model.get_compiled_call(None)),
    "get_parameter_or_buffer": lambda model, _: plain(model.get_parameter_or_buffer("model.norm.weight")),
    "named_non_persistent_buffers": lambda model, _: {
        name: plain(buffer) for name, buffer in model.named_non_persistent_buffers()
    },
    "retrieve_modules_from_names": lambda model, _: len(
        model.retrieve_modules_from_names(["model.layers.0.mlp.up_proj.weight"])
    ),
    "from_pretrained": new_model,
    "warn_if_padding_and_no_attention_mask": lambda model, _: model.warn_if_padding_and_no_attention_mask(
        tokens(), None
    ),
    "prepare_distribute_model": lambda model, _: model.prepare_distribute_model(None),
    "maybe_distribute_model": lambda model, _: model.maybe_distribute_model(model, None, object()),
    "should_save_on_this_rank": lambda model, _: model.should_save_on_this_rank(False),
    "gather_sharded_state_dict_for_save": lambda model, _: model.gather_sharded_state_dict_for_save(model, {}, None),
    "save_distributed_checkpoint": lambda model, folder: model.save_distributed_checkpoint(model, folder),
    "barrier_after_gathered_checkpoint_save": lambda model, _: model.barrier_after_gathered_checkpoint_save(None),
    "half": lambda model, _: plain(model.half().dtype),
    "float": lambda model, _: plain(model.float().dtype),
    "to": lambda model, _: plain(model.to("cpu").device),
    "to: float64": lambda model, _: plain(model.to(torch.float64).dtype),
    "add_adapter": lambda model, _: lora(model),
    "load_adapter": lambda model, folder: model.load_adapter(str(folder)),
    "set_adapter": lambda model, _: model.set_adapter("default"),
    "delete_adapter": lambda model, _: model.delete_adapter("default"),
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "push_to_hub": lambda model, _: model.push_to_hub("a/model"),
}  # fmt: skip

GENERATION: dict[str, Call] = {
    "generate": lambda model, _: plain(generated(model, do_sample=False)),
    "generate: beams": lambda model, _: plain(generated(model, do_sample=False, num_beams=3)),
    "generate: sampled": lambda model, _: plain(generated(model, do_sample=True)),
    "generate: assisted": lambda model, _: plain(generated(model, do_sample=False, prompt_lookup_num_tokens=2)),
    "compute_transition_scores": lambda model, _: transition_scores(model),
    "prepare_inputs_for_generation": lambda model, _: sorted(model.prepare_inputs_for_generation(tokens())),
    "load_custom_generate": lambda model, folder: model.load_custom_generate(folder),
    "generate_batch": lambda model, _: model.generate_batch([[1, 2, 3]]),
    "init_continuous_batching": lambda model, _: model.init_continuous_batching() and None,
    "continuous_batching_context_manager": lambda model, _: model.continuous_batching_context_manager() and None,
    "heal_tokens": lambda model, _: model.heal_tokens(tokens()),
}

MODULE: dict[str, Call] = {
    "bfloat16": lambda model, _: plain(model.bfloat16().dtype),
    "double": lambda model, _: plain(model.double().dtype),
    "type": lambda model, _: plain(model.type(torch.float64).dtype),
    "cpu": lambda model, _: plain(model.cpu().device),
    "apply": lambda model, _: plain(model.apply(lambda module: None)),
    "zero_grad": lambda model, _: [numbers(model), model.zero_grad(), model.model.norm.weight.grad][1:],
    "requires_grad_": lambda model, _: plain(model.requires_grad_(True)),
    "share_memory": lambda model, _: plain(model.share_memory()),
    "get_submodule": lambda model, _: plain(model.get_submodule("model.norm").weight),
    "get_parameter": lambda model, _: plain(model.get_parameter("model.norm.weight")),
    "get_buffer": lambda model, _: plain(model.get_buffer("model.rotary_emb.inv_freq")),
    "named_parameters": lambda model, _: sorted(name for name, _ in model.named_parameters()),
    "parameters": lambda model, _: len(list(model.parameters())),
    "named_modules": lambda model, _: [name for name, _ in model.named_modules()],
    "named_buffers": lambda model, _: {name: plain(buffer) for name, buffer in model.named_buffers()},
    "register_forward_hook": lambda model, _: (
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: output * 2) and None
    ),
    "register_forward_hook: head": lambda model, _: (
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2) and None
    ),
    "register_forward_hook: embedding": lambda model, _: (
        model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output * 2) and None
    ),
    "register_forward_pre_hook": lambda model, _: (
        model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)) and None
    ),
    "register_full_backward_hook": lambda model, _: (
        model.model.layers[0].register_full_backward_hook(lambda module, given, got: None) and None
    ),
    "register_buffer": lambda model, _: model.register_buffer("a_buffer", torch.ones(2)),
    "register_module": lambda model, _: model.register_module("a_module", torch.nn.Linear(2, 2)),
    "register_parameter": lambda model, _: model.register_parameter("a_parameter", torch.nn.Parameter(torch.ones(2))),
    "copy.deepcopy": lambda model, _: numbers(copy.deepcopy(model)),
    "compile": lambda model, _: model.compile(backend="eager"),
    "state_dict": lambda model, _: len(model.state_dict()),
    "load_state_dict": lambda model, _: plain(model.load_state_dict(dict(model.named_parameters()))),
}

TOGETHER: frozenset[str] = frozenset()
"""Calls of one model, one after the other; a model is loaded faster than that is worth."""

CALLS = {"PreTrainedModel": MODEL, "GenerationMixin": GENERATION, "nn.Module": MODULE}
"""By section of docs/calls.md."""
