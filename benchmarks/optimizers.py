"""python -m benchmarks.optimizers [--tp 2 4] [--models llama phi3 ...] [--optimizers Muon ...] [--steps 5]

Every kind of optimizer on sharded models: how far the losses of five steps are from those of the unsharded model.
Columns: the unsharded model itself in float64 when each gradient is changed by 1e-15 of it ("rounding": what no order
of sums can avoid), a loop without an engine in float64, and engines in float32 without ZeRO and under ZeRO 1 and 2. A
cell is the largest relative difference over the models; or the code of the refusal. One launch of ranks per TP size.
SOAP and Shampoo of `pytorch_optimizer` and `bitsandbytes` are tried where they are installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.helpers.launch import launch

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "phi3": ("phi3", {}),
    "phi3, 2 KV heads": ("phi3", {"num_key_value_heads": 2}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {"num_key_value_heads": 2}),
}
"""A variant of `tests.helpers.models`, and what is changed. On four ranks, two KV heads are partly replicated."""
ENGINES = ("ZeRO 0", "ZeRO 1", "ZeRO 2")
COLUMNS = ("own loop", *ENGINES)
ROUNDING = "rounding"
CLIP = 0.5
DEEPSPEED_MUON = "DeepSpeed Muon"
MUON_SECTION = {"type": "Muon", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}
TOLERANCE = 1e-5

Cell = list[float] | str
"""Losses, or why there are none."""


def makers() -> dict[str, Callable[[Any], Any]]:
    """By name: what makes an optimizer of a model."""
    import torch
    import transformers

    from tests.helpers import optimizers as kinds

    def matrices(model: Any) -> list[Any]:
        return [one for name, one in model.named_parameters() if one.dim() == 2 and "layers" in name]

    found: dict[str, Callable[[Any], Any]] = {
        "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
        "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
        "Lion": lambda model: kinds.Lion(model.parameters(), lr=1e-4),
        "Muon": lambda model: torch.optim.Muon(matrices(model), lr=1e-2),
        "Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2, weight_decay=0.1),
        "transformers' Adafactor": lambda model: transformers.Adafactor(model.parameters()),
        "LAMB": lambda model: kinds.Lamb(model.parameters()),
        "LARS": lambda model: kinds.Lars(model.parameters()),
        "Shampoo": lambda model: kinds.Shampoo(matrices(model), lr=1e-3),
        "SOAP": lambda model: kinds.Soap(matrices(model), lr=1e-3),
        "8-bit Adam": lambda model: kinds.EightBitAdam(model.parameters(), lr=1e-3),
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        more = importlib.import_module("pytorch_optimizer")
        found |= {
            "SOAP (pytorch_optimizer)": lambda model: more.SOAP(matrices(model), lr=1e-3),
            "Shampoo (pytorch_optimizer)": lambda model: more.Shampoo(matrices(model), lr=1e-3),
        }
    if importlib.util.find_spec("bitsandbytes"):
        eight_bit = importlib.import_module("bitsandbytes").optim
        found["AdamW8bit (bitsandbytes)"] = lambda model: eight_bit.AdamW8bit(model.parameters(), lr=1e-3)
    return found


def settings(stage: int, **more: Any) -> dict[str, Any]:
    """A DeepSpeed config."""
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": CLIP, "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, **more,
    }  # fmt: skip


def losses(forward: Any, backward: Any, step: Any, num_steps: int) -> list[float]:
    """Of the same batches each time."""
    from tests.helpers.models import batch

    found = []
    for seed in range(num_steps):
        loss = forward(input_ids=batch(seed), labels=batch(seed)).loss
        backward(loss)
        step()
        found.append(loss.item())
    return found


def own_loop(model: Any, optimizer: Any, num_steps: int, rounding: float = 0.0) -> list[float]:
    """Losses of a loop without an engine, with each gradient changed by that part of it."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        for one in model.parameters() if rounding else ():
            one.grad.mul_(1 + rounding * torch.randn(one.shape, generator=generator, dtype=one.dtype))
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        model.zero_grad()

    return losses(model, lambda loss: loss.backward(), step, num_steps)


def exact_muon() -> Any:
    """Newton-Schulz in float64: in bfloat16 the last digit of a gradient changes percents of an update."""
    from torch.optim import _muon

    from autotp_plan.runtime.verify.optimizer_steps import orthogonalised
    from autotp_plan.schemas.upstream import replaced

    return replaced(_muon, "_zeropower_via_newtonschulz", orthogonalised)


class NoSuchRunError(Exception):
    """DeepSpeed's Muon is in its engine and has no loop without one."""


def run_all(
    run: Callable[[str, str], list[float]], names: Iterable[str], columns: Iterable[str] = COLUMNS
) -> dict[str, dict[str, Cell]]:
    """`run(optimizer, column)` of each; an error in the place of its losses."""
    import torch

    from autotp_plan.schemas.errors import MismatchError

    torch.compiler.set_stance("force_eager")
    found: dict[str, dict[str, Cell]] = {}
    with exact_muon():
        for name in names:
            found[name] = {}
            for column in columns:
                try:
                    found[name][column] = run(name, column)
                except MismatchError as error:
                    found[name][column] = error.faults[0].code or "refused"
                except NoSuchRunError:
                    found[name][column] = "-"
                except Exception as error:  # shown in the table
                    found[name][column] = f"{type(error).__name__}: {error}"
    return found


def of_dense(folder: Path, names: list[str], num_steps: int) -> dict[str, dict[str, Cell]]:
    """Of the unsharded model. DeepSpeed's Muon is in its engine; others step the model itself."""
    import deepspeed
    import torch

    from tests.helpers.models import eager_experts, load_dense

    def run(name: str, column: str) -> list[float]:
        dtype = torch.float32 if column in ENGINES else torch.float64
        model = load_dense(folder, dtype, **eager_experts(dtype))
        if name != DEEPSPEED_MUON:
            return own_loop(model, makers()[name](model), num_steps, 1e-15 if column == ROUNDING else 0.0)
        if column not in ENGINES:
            raise NoSuchRunError
        config = settings(ENGINES.index(column), optimizer=MUON_SECTION)
        engine = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]
        return losses(engine, engine.backward, engine.step, num_steps)

    return run_all(run, names, (ROUNDING, *COLUMNS))


def of_ranks(work: Path, models: list[str], names: list[str], num_steps: int) -> dict[str, dict[str, dict[str, Cell]]]:
    """Of the sharded models, by model."""
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers.models import eager_experts

    def of_model(model_name: str) -> dict[str, dict[str, Cell]]:
        plan = load_plan(work / f"{model_name}.json")

        def run(name: str, column: str) -> list[float]:
            dtype = torch.float32 if column in ENGINES else torch.float64
            model = plan.load_model(work / model_name, dtype=dtype, **eager_experts(dtype)).train()
            if column not in ENGINES:
                if name == DEEPSPEED_MUON:
                    raise NoSuchRunError
                optimizer = makers()[name](model)
                plan.adapt_optimizer(model, optimizer)
                return own_loop(model, optimizer, num_steps)
            more = {"optimizer": MUON_SECTION} if name == DEEPSPEED_MUON else {}
            config = settings(ENGINES.index(column), **more)
            optimizer = None if more else makers()[name](model)
            engine = plan.initialize(model, config=config, optimizer=optimizer)[0]
            return losses(engine, engine.backward, engine.step, num_steps)

        return run_all(run, names)

    return {one: of_model(one) for one in models}


def difference(dense: Cell, found: Cell) -> float | str:
    """The largest relative difference of losses, or why there is none."""
    if isinstance(found, str):
        return found
    if isinstance(dense, str):
        return f"unsharded: {dense}"
    return max(abs(one - other) / abs(other) for one, other in zip(found, dense, strict=True))


def row(dense: dict[str, Cell], ranks: list[dict[str, Cell]]) -> dict[str, float | str]:
    """By column: the largest difference of all ranks."""
    found = {column: largest([difference(dense[column], one[column]) for one in ranks]) for column in COLUMNS}
    return {ROUNDING: difference(dense["own loop"], dense[ROUNDING]), **found}


def largest(differences: list[float | str]) -> float | str:
    """Of several models: the largest difference, or the refusal of all. A mixture of both is shown."""
    numbers = [one for one in differences if not isinstance(one, str)]
    refusals = sorted({one for one in differences if isinstance(one, str)})
    if numbers and refusals:
        return f"{max(numbers):.0e}, {', '.join(refusals)}"
    return max(numbers) if numbers else ", ".join(refusals)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", help="those whose names begin so; default: all")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--each", action="store_true", help="a row for each model")
    options = parser.parse_args()

    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    names = [*makers(), DEEPSPEED_MUON]
    if options.optimizers:
        names = [name for name in names if name.startswith(tuple(options.optimizers))]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dense = {}
        for model in options.models:
            variant, changes = MODELS[model]
            save_checkpoint(work / model, variant, **changes)
            dense[model] = launch(of_dense, 1, work / model, names, options.steps, timeout=900)[0]
        wrong = 0
        for tp_size in options.tp:
            for model in options.models:
                (work / f"{model}.json").write_text(compile_plan(work / model, tp_size=tp_size).to_json())
            ranks = launch(of_ranks, tp_size, work, options.models, names, options.steps, timeout=1800)
            print(f"\nTP={tp_size:<27}" + "".join(f"{column:30}" for column in (ROUNDING, *COLUMNS)))
            for name in names:
                rows = {model: row(dense[model][name], [one[model][name] for one in ranks]) for model in options.models}
                for model, found in rows.items() if options.each else ():
                    print(f"  {name}, {model}: {found}")
                together = {
                    column: largest([found[column] for found in rows.values()]) for column in (ROUNDING, *COLUMNS)
                }
                noise = together[ROUNDING]
                limit = TOLERANCE if isinstance(noise, str) else max(TOLERANCE, 10 * noise)
                wrong += sum(not isinstance(one, str) and one > limit for one in together.values())
                cells = [f"{one:.0e}" if not isinstance(one, str) else one for one in together.values()]
                print(f"{name:30}" + "".join(f"{cell:30}" for cell in cells), flush=True)
    print(f"\n{wrong} cells differ by more than {TOLERANCE:.0e}, and more than by rounding")


if __name__ == "__main__":
    main()
