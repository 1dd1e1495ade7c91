"""What is checked on a GPU: functions of `Work`, which both ranks call, that give a largest error and figures."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.hybrids import HYBRIDS

FLOAT64, FLOAT32 = 1e-9, 1e-5
FAMILIES = (
    "llama_bias_tied", "qwen3", "phi3", "gpt_neox", "gemma2", "falcon_multi_query", "falcon_alibi", "bloom", "gpt2",
    "olmo2", "codegen", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text",
)  # fmt: skip
TRAINED = ("llama", "phi3", "mixtral")
STEPS = 5

Found = tuple[float | None, dict[str, Any]]
_KEPT: list[BaseException] = []
_INFERENCE_SECONDS = 240


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A folder that both ranks share, the device, and the size of the model that is loaded and timed."""

    folder: Path
    device: str
    hidden: int
    layers: int

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """What `make` writes to a folder; the first rank calls it, the first time. A collective."""
        path = self.folder / name
        if dist.get_rank() == 0 and not path.exists():
            unfinished = path.with_name(f"{name}.unfinished")
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(path)
        dist.barrier()
        return path


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A check by name, the largest error that it allows, and whether it is of no use without a card."""

    name: str
    function: Callable[[Work], Found]
    limit: float | None = None
    needs_cuda: bool = False


def relative(found: list[float], expected: list[float]) -> float:
    """The largest relative error."""
    return max(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(found, expected, strict=True))


def checkpoint(work: Work, variant: str, **changes: Any) -> Path:
    """A small random checkpoint of a family."""
    from tests.helpers.models import save_checkpoint

    name = "-".join([variant, *changes])
    return work.once(name, lambda path: save_checkpoint(path, variant, **changes))


def sharded(work: Work, variant: str, *, from_shards: bool = True, changes: Any = None, **options: Any) -> Any:
    """A plan, and this rank's model in training mode."""
    from autotp_plan.planner import compile_plan, presplit
    from autotp_plan.runtime import TrainingPlan

    folder = checkpoint(work, variant, **(changes or {}))
    plan = TrainingPlan(compile_plan(folder, tp_size=dist.get_world_size()))
    if from_shards:
        folder = work.once(f"{folder.name}.shards", lambda path: presplit(plan.document, folder, path))
    return plan, plan.load_model(folder, **options).train()


def dense(work: Work, variant: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The unsharded model on the same device, in training mode."""
    from tests.helpers.models import load_dense

    return load_dense(checkpoint(work, variant), dtype, **options).to(work.device)


def batches(work: Work) -> Callable[[int], Tensor]:
    """Token ids by seed, on the device."""
    from tests.helpers.models import batch

    return lambda seed: batch(seed).to(work.device)


def parity(variant: str, work: Work, document: Any = None) -> Found:
    """Loss, logits and every gradient of two passes in float64."""
    from autotp_plan.runtime import TrainingPlan
    from tests.helpers.models import eager_experts

    options = eager_experts(torch.float64)
    if document is None:
        plan, model = sharded(work, variant, dtype=torch.float64, **options)
    else:
        plan = TrainingPlan(document)
        model = plan.load_model(checkpoint(work, variant), dtype=torch.float64, **options).train()
    return _compare(work, plan, dense(work, variant, torch.float64, **options), model)


def _compare(work: Work, plan: Any, whole: Any, model: Any) -> Found:
    """The largest absolute error of a sharded model's loss, logits and gradients of two passes."""
    from autotp_plan.runtime.verify import compare
    from autotp_plan.runtime.verify.float64_passes import causal_lm, dense_reader, run_passes, shard_reader

    names = [name for name, _ in whole.named_parameters()]
    expected = run_passes(whole, dense_reader(whole), names, batches(work), forward=causal_lm)
    found = run_passes(model, shard_reader(model), list(expected["gradient"]), batches(work), forward=causal_lm)
    errors = compare.errors(expected, found, plan.document, plan.ranks.tp_rank, compare.absolute_error)
    return max(max(of_kind.values()) for of_kind in errors.values()), {"numbers": sum(map(len, errors.values()))}


def hybrid(family: str, work: Work) -> Found:
    """As `parity`, of a model whose mixers are not attention, by rules that were inferred."""
    from transformers import AutoModelForCausalLM

    from autotp_plan.runtime.verify.float64_passes import EXPERTS

    plan, folder = inferred(work, family)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **EXPERTS).to(work.device).train()
    model = plan.load_model(folder, dtype=torch.float64, **EXPERTS).train()
    return _compare(work, plan, whole, model)


def hybrid_kernels(work: Work) -> Found:
    """Loss and gradient norm in bfloat16 with the kernels that are installed; float64 has none."""
    import importlib.util

    from transformers import AutoModelForCausalLM

    plan, folder = inferred(work, "qwen3_next")
    tokens = batches(work)(0)
    found = []
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(work.device)
    for model in (whole.train(), plan.load_model(folder, dtype=torch.bfloat16).train()):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        found.append([loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()])
    return relative(found[1], found[0]), {"flash-linear-attention": importlib.util.find_spec("fla") is not None}


def inferred(work: Work, family: str) -> tuple[Any, Path]:
    """A plan of a small hybrid by the rules that `benchmarks.gpu.hybrids` infers meanwhile, and its checkpoint."""
    from autotp_plan.planner import SpecFile, compile_plan
    from autotp_plan.runtime import TrainingPlan

    def write(path: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        from autotp_plan.runtime.verify.random_inputs import randomise
        from tests.helpers.mixers import mixer_folder

        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(mixer_folder(path, family)), dtype=torch.float32
        )
        randomise(model)
        model.save_pretrained(path)

    folder = work.once(f"hybrid-{family}", write)
    rules = work.folder / f"{family}.spec.json"
    deadline = time.monotonic() + _INFERENCE_SECONDS
    while not rules.exists():
        log = work.folder / f"{family}.log"
        assert time.monotonic() < deadline, f"the rules of {family} were not inferred: {log.read_text()[-2000:]}"
        time.sleep(0.5)
    document = compile_plan(folder, tp_size=dist.get_world_size(), preset="none", specs=[SpecFile.read(rules)])
    return TrainingPlan(document), folder


def planted(work: Work) -> Found:
    """A plan that is wrong on purpose is far from the unsharded model: gradients of norms are not summed."""
    from autotp_plan.planner import compile_plan

    document = compile_plan(checkpoint(work, "qwen3"), tp_size=dist.get_world_size())
    forgotten = tuple(dataclasses.replace(entry, partial_gradient=False) for entry in document.parameters)
    error, _ = parity("qwen3", work, dataclasses.replace(document, parameters=forgotten))
    assert error is not None and error > 1e-3, f"a wrong plan went unnoticed: its largest error is {error}"
    return None, {"found": error}


def engine(variant: str, stage: int, work: Work, **changes: Any) -> Found:
    """Losses of steps of a DeepSpeed engine in float32."""
    from autotp_plan.runtime.verify import optimizer_steps
    from autotp_plan.runtime.verify.float64_passes import causal_lm

    training = optimizer_steps.Training(batches=batches(work), num_steps=STEPS, eps=1e-5)
    expected = optimizer_steps.dense_steps(dense(work, variant), training, causal_lm)
    plan, model = sharded(work, variant)
    norms = (lambda _: 0.0) if stage == 0 else (lambda made: made.get_global_grad_norm())
    found = optimizer_steps.engine_steps(
        plan, model, training, zero_stage=stage, forward=causal_lm, norm=norms, **changes
    )
    columns = 1 if stage == 0 else 2  # without ZeRO an engine does not tell its norm
    return max(relative([s[i] for s in found], [s[i] for s in expected]) for i in range(columns)), {}


def overlap(work: Work) -> Found:
    """All-reduces that run while a weight's gradient is computed."""
    settings = {"autotp_size": dist.get_world_size(), "tp_overlap_comm": True}
    return engine("llama", 3, work, tensor_parallel=settings)


def fused_adam(work: Work) -> Found:
    """DeepSpeed's own AdamW, compiled for the card."""
    from autotp_plan.runtime.verify.optimizer_steps import Training

    adam = Training(batches=batches(work), eps=1e-5).adam
    return engine("llama", 1, work, optimizer={"type": "AdamW", "params": {**adam, "adam_w_mode": True}})


def offload(stage: int, work: Work) -> Found:
    """DeepSpeed's AdamW in the memory of the host."""
    from autotp_plan.runtime.verify.optimizer_steps import Training

    adam = Training(batches=batches(work), eps=1e-5).adam
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    return engine(
        "llama",
        stage,
        work,
        zero_optimization=zero,
        optimizer={"type": "AdamW", "params": {**adam, "adam_w_mode": True}},
    )


def bf16(work: Work) -> Found:
    """Losses in bfloat16 under each ZeRO stage against the unsharded engine's in bfloat16."""
    figures: dict[str, Any] = {}
    tokens = batches(work)
    whole = dense(work, "llama", torch.bfloat16)
    master = [value.detach().float().requires_grad_() for value in whole.parameters()]
    adam: dict[str, Any] = {"lr": 2e-3, "eps": 1e-5, "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(master, **adam)
    expected = []
    for step in range(STEPS):
        loss = whole(input_ids=tokens(step), labels=tokens(step), use_cache=False).loss
        loss.backward()
        for copy, value in zip(master, whole.parameters(), strict=True):
            copy.grad, value.grad = value.grad.float(), None
        torch.nn.utils.clip_grad_norm_(master, 1.0)
        optimizer.step()
        with torch.no_grad():
            for copy, value in zip(master, whole.parameters(), strict=True):
                value.copy_(copy)
        expected.append(loss.item())
    for stage in (1, 2, 3):
        plan, model = sharded(work, "llama", dtype=torch.bfloat16)
        config = {
            "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage},
            "gradient_clipping": 1.0, "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True}},
        }  # fmt: skip
        made, _, _, _ = plan.initialize(model, config=config)
        losses = []
        for step in range(STEPS):
            loss = made(input_ids=tokens(step), labels=tokens(step), use_cache=False).loss
            made.backward(loss)
            made.step()
            losses.append(loss.item())
        made.destroy()
        figures[f"ZeRO {stage}"] = relative(losses, expected)
    return max(figures.values()), figures


def write_large(work: Work) -> Path:
    """A random Llama in bfloat16; with hidden size 4096 and 32 layers it has the shapes of Llama-3.1-8B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def write(path: Path) -> None:
        heads = max(2, work.hidden // 128)
        config: Any = LlamaConfig(
            hidden_size=work.hidden, intermediate_size=work.hidden * 7 // 2, num_hidden_layers=work.layers,
            num_attention_heads=heads, num_key_value_heads=max(2, heads // 4), dtype="bfloat16",
            vocab_size=128256 if work.hidden >= 4096 else 32000,
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(work.device):
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
        model.save_pretrained(path)
        del model
        _reset_memory(work)

    return work.once("large", write)


def large(work: Work) -> Any:
    """A plan, a checkpoint and the shards of the large model."""
    from autotp_plan.planner import compile_plan, presplit
    from autotp_plan.runtime import TrainingPlan

    folder = write_large(work)
    plan = TrainingPlan(compile_plan(folder, tp_size=dist.get_world_size()))
    return plan, folder, work.once("large.shards", lambda path: presplit(plan.document, folder, path))


def loading(work: Work) -> Found:
    """Memory of the card while a rank's shards are loaded: the error is the relative excess over their bytes."""
    plan, folder, shards = large(work)
    figures: dict[str, Any] = {}
    excess = 0.0
    for name, source in (("shards", shards), ("checkpoint", folder)):
        before = _reset_memory(work)
        dist.barrier()
        began = time.perf_counter()
        model = plan.load_model(source)
        _synchronize(work)
        figures[f"{name}, s"] = time.perf_counter() - began
        weights = sum(value.numel() * value.element_size() for value in model.parameters())
        figures["weights, MiB"] = weights / 2**20
        if work.device == "cuda":
            peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
            figures[f"{name}, peak MiB"] = peak / 2**20
            excess = max(excess, peak / weights - 1)
        del model
    return excess, figures


def large_loss(work: Work) -> Found:
    """The loss of the large model in bfloat16, and the norm of its gradient."""
    from transformers import AutoModelForCausalLM

    plan, folder, shards = large(work)
    length = 2048 if work.device == "cuda" else 32
    tokens = torch.randint(32000, (1, length), generator=torch.Generator().manual_seed(0)).to(work.device)
    found = []
    for name in ("sharded", "unsharded"):
        model: Any = None
        if name == "sharded":
            model = plan.load_model(shards).train()
        elif dist.get_rank() == 0:  # there may be no room for two
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(work.device).train()
        if model is not None:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
            found.append([loss.item(), norm.item()])
        dist.barrier()
        del model
        _reset_memory(work)
    figures: dict[str, Any] = {"loss": found[0][0], "gradient norm": found[0][1]}
    if len(found) == 1:
        return None, figures
    return relative(found[0], found[1]), {**figures, "unsharded": found[1]}


def _reset_memory(work: Work) -> int:
    if work.device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def _synchronize(work: Work) -> None:
    if work.device == "cuda":
        torch.cuda.synchronize()


def steps(work: Work) -> Found:
    """The share of a forward and backward pass in bfloat16 that comparing the batches of every 100th takes."""
    plan, _, shards = large(work)
    shape = (1, 2048) if work.device == "cuda" else (1, 32)
    tokens = torch.randint(32000, shape, generator=torch.Generator().manual_seed(0)).to(work.device)
    model = plan.load_model(shards, check_batches_every=2).train()
    times: list[list[float]] = [[], []]  # every second forward compares, the first among them
    for number in range(16):
        dist.barrier()
        _synchronize(work)
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        _synchronize(work)
        model.zero_grad()
        if number > 3:
            times[number % 2].append(time.perf_counter() - began)
    compared, without = (statistics.median(of_kind) for of_kind in times)
    share = (compared - without) / without / 100
    figures = {"forward and backward, ms": without * 1e3, "with comparison, ms": compared * 1e3}
    return max(share, 0.0), {**figures, "share at every 100th, %": share * 100}


def synchronizing_calls(work: Work) -> Found:
    """How often a forward and backward pass waits for the card, sharded and not: the error is the difference."""
    counts = []
    tokens = batches(work)(0)
    _, model = sharded(work, "llama")
    for one in (dense(work, "llama"), model):
        one(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.cuda.set_sync_debug_mode("default")
        counts.append([f"{Path(one.filename).name}:{one.lineno}" for one in caught])
    return float(len(counts[1]) - len(counts[0])), {"unsharded": len(counts[0]), "sharded": len(counts[1]),
                                                     "where": " ".join(sorted(set(counts[1])))}  # fmt: skip


def resume(work: Work) -> Found:
    """A job that is saved and resumed has the losses of one that goes on; and shards of it."""
    tokens = batches(work)
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}, "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
    }  # fmt: skip

    def step(made: Any, seed: int) -> float:
        loss = made(input_ids=tokens(seed), labels=tokens(seed), use_cache=False).loss
        made.backward(loss)
        made.step()
        return float(loss)

    changes = {"attention_dropout": 0.1}  # random numbers of the card are saved too
    plan, model = sharded(work, "llama", changes=changes)
    first, _, _, _ = plan.initialize(model, config=config)
    step(first, 0)
    plan.save_checkpoint(first, work.folder / "job")
    plan.save_shards(first, work.folder / "trained")
    expected = [step(first, seed) for seed in (1, 2)]
    plan, model = sharded(work, "llama", changes=changes)
    second, _, _, _ = plan.initialize(model, config=config)
    plan.load_checkpoint(second, work.folder / "job")
    found = [step(second, seed) for seed in (1, 2)]
    return relative(found, expected), {}


def saving(work: Work) -> Found:
    """`save_pretrained` of a sharded model on the card: bit for bit the checkpoint it came from."""
    from safetensors.torch import load_file

    _, model = sharded(work, "phi3")
    folder = work.folder / "saved"
    model.save_pretrained(folder)
    dist.barrier()
    source, saved = ({}, {})  # type: tuple[dict[str, Tensor], dict[str, Tensor]]
    for place, tensors in ((checkpoint(work, "phi3"), source), (folder, saved)):
        for path in sorted(place.glob("*.safetensors")):
            tensors.update(load_file(path))
    assert source.keys() == saved.keys()
    return max((source[name] - saved[name]).abs().max().item() for name in source), {"tensors": len(source)}


def generation(work: Work) -> Found:
    """Greedy tokens are the unsharded model's; sampled ones are the same on both ranks."""
    tokens = batches(work)(3)[:, :6]
    _, model = sharded(work, "llama")
    options = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.eval().generate(tokens, do_sample=False, **options)
    expected = dense(work, "llama").eval().generate(tokens, do_sample=False, **options)
    torch.manual_seed(dist.get_rank())
    sampled = model.generate(tokens, do_sample=True, **options)
    both: list[Any] = [None, None]
    dist.all_gather_object(both, sampled.tolist())
    assert both[0] == both[1], "the ranks sampled different tokens"
    return float((greedy != expected).sum()), {"tokens": greedy.numel()}


def lora(work: Work) -> Found:
    """Losses of steps of an adapter in float32."""
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = checkpoint(work, "llama")
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )

    def write(path: Path) -> None:
        from tests.helpers.models import load_dense

        torch.manual_seed(0)
        model = get_peft_model(load_dense(folder), config)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.normal_(std=0.1)
        model.save_pretrained(str(path), save_embedding_layers=False)

    adapter = work.once("adapter", write)
    plan, model = sharded(work, "llama")
    runs = [
        PeftModel.from_pretrained(dense(work, "llama"), str(adapter), is_trainable=True),
        plan.load_adapter(model, adapter),
    ]
    return relative(*(_adam_losses(work, run) for run in reversed(runs))), {}


def _adam_losses(work: Work, model: Any, optimizer: Any = None) -> list[float]:
    tokens = batches(work)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-2, eps=1e-5)
    losses = []
    for step in range(STEPS):
        loss = model(input_ids=tokens(step), labels=tokens(step), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def optimizers(name: str, work: Work) -> Found:
    """An optimizer that looks at whole tensors, in a loop without an engine."""
    from tests.helpers.optimizers import Lamb

    def make(model: Any) -> Any:
        matrices = [value for value in model.parameters() if value.dim() == 2]
        made: dict[str, Callable[[], Any]] = {
            "Adafactor": lambda: torch.optim.Adafactor(model.parameters(), lr=1e-2),
            "LAMB": lambda: Lamb(model.parameters(), lr=1e-3),
            "Muon": lambda: torch.optim.Muon(matrices, lr=1e-3),
        }
        return made[name]()

    whole = dense(work, "phi3")
    plan, model = sharded(work, "phi3")
    optimizer = make(model)
    plan.adapt_optimizer(model, optimizer)
    return relative(_adam_losses(work, model, optimizer), _adam_losses(work, whole, make(whole))), {}


def dropout(work: Work) -> Found:
    """Both ranks drop the same activations, and recomputed activations have the same masks."""
    tokens = batches(work)(0)
    _, model = sharded(work, "gpt2", changes={"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2})
    losses, gradients = [], []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        torch.manual_seed(7)
        output = model(input_ids=tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
        model.zero_grad()
    both: list[Any] = [None, None]
    dist.all_gather_object(both, losses[0])
    assert both[0] == both[1], f"the ranks have different losses: {both}"
    pairs = zip(*gradients, strict=True)
    return max((one - other).abs().max().item() / one.abs().max().item() for one, other in pairs), {"loss": losses[0]}


def compiled(variant: str, work: Work) -> Found:
    """`torch.compile` by inductor, against eager, in float32."""
    tokens = batches(work)(0)
    _, model = sharded(work, variant)
    found = []
    for step in (model, torch.compile(model)):
        loss = step(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(value.grad.clone() for value in model.parameters() if value.grad is not None)])
        model.zero_grad()
    errors = [(one - other).abs().max() / one.abs().max() for one, other in zip(*found, strict=True)]
    return max(errors).item(), {}


def trainer(work: Work) -> Found:
    """Hugging Face's Trainer: the losses of a loop over the unsharded model."""
    from transformers import Trainer, TrainingArguments

    from tests.helpers.models import batch

    plan, model = sharded(work, "llama")
    rows = [{"input_ids": row, "labels": row} for seed in range(STEPS) for row in batch(seed)]
    arguments = TrainingArguments(
        str(work.folder / "trainer"), per_device_train_batch_size=2, max_steps=STEPS, report_to=[], disable_tqdm=True,
        logging_steps=1, lr_scheduler_type="constant", learning_rate=1e-2, adam_epsilon=1e-5, weight_decay=0.01,
        max_grad_norm=0.5, save_strategy="no", use_cpu=work.device == "cpu", train_sampling_strategy="sequential",
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "zero_optimization": {"stage": 1},
        },
    )  # fmt: skip
    made = Trainer(model, arguments, train_dataset=rows)
    plan.adapt_trainer(made)
    made.train()
    found = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return relative(found, _adam_losses(work, dense(work, "llama"))), {}


def unknown_token(work: Work) -> Found:
    """An id outside of the vocabulary ends in an error, as it does without sharding. The card is of no use after it."""
    tokens = batches(work)(0)
    _, model = sharded(work, "llama", check_batches_every=None)
    tokens[0, 0] = 256
    try:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
    except (RuntimeError, IndexError) as error:
        _KEPT.append(error)  # with its frames: to free a tensor on that card would end the process
        return None, {"says": str(error).splitlines()[0]}
    raise AssertionError("a loss was computed")


def too_few_devices(work: Work) -> Found:
    """A rank without a card of its own is told so."""
    import os

    from autotp_plan.runtime.deepspeed.mesh import init_ranks
    from autotp_plan.schemas.errors import MismatchError

    os.environ["LOCAL_RANK"] = str(torch.cuda.device_count())
    try:
        init_ranks(dist.get_world_size())
    except MismatchError as error:
        return 0.0, {"says": str(error).splitlines()[0]}
    finally:
        os.environ["LOCAL_RANK"] = "0"
    raise AssertionError("nothing was said")


CHECKS = (
    *(Check(name=f"float64 {name}", function=functools.partial(parity, name), limit=FLOAT64) for name in FAMILIES),
    Check(name="float64 planted error", function=planted),
    *(
        Check(name=f"engine {name} ZeRO {stage}", function=functools.partial(engine, name, stage), limit=FLOAT32)
        for name in TRAINED
        for stage in range(4)
    ),
    Check(name="engine overlap", function=overlap, limit=FLOAT32),
    Check(name="bf16", function=bf16, limit=1e-2),
    Check(name="resume", function=resume, limit=1e-6),
    Check(name="save_pretrained", function=saving, limit=0.0),
    Check(name="generate", function=generation, limit=0.0),
    Check(name="LoRA", function=lora, limit=FLOAT32),
    *(
        Check(name=f"optimizer {name}", function=functools.partial(optimizers, name), limit=limit)
        for name, limit in (("Adafactor", FLOAT32), ("LAMB", FLOAT32), ("Muon", 1e-3))
    ),
    Check(name="dropout", function=dropout, limit=FLOAT32),
    Check(name="Trainer", function=trainer, limit=1e-4),  # it rounds the losses that it logs to four decimals
    *(
        Check(
            name=f"hybrid {name}", function=functools.partial(hybrid, name), limit=1e-8
        )  # decays are products of many
        for name in HYBRIDS
    ),
    Check(name="hybrid in bf16", function=hybrid_kernels, limit=3e-2),
    Check(name="large loading", function=loading, limit=0.01),
    Check(name="large loss", function=large_loss, limit=1e-2),
    Check(name="large batch comparison", function=steps, limit=0.005),
    Check(name="waits for the card", function=synchronizing_calls, limit=0.0, needs_cuda=True),
    Check(name="too few cards", function=too_few_devices, needs_cuda=True),
    Check(name="compile llama", function=functools.partial(compiled, "llama"), limit=1e-4),
    Check(name="compile mixtral", function=functools.partial(compiled, "mixtral"), limit=1e-4),
    Check(name="FusedAdam", function=fused_adam, limit=FLOAT32, needs_cuda=True),
    *(
        Check(name=f"offload ZeRO {stage}", function=functools.partial(offload, stage), limit=FLOAT32, needs_cuda=True)
        for stage in (2, 3)
    ),
    Check(name="unknown token", function=unknown_token),
)
"""In the order in which they run: what is new on a card, and what may take long, comes last."""
