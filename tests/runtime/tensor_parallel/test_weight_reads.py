"""Code that computes with the weight of a sharded layer, in the place of the layer: found, avoided or refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp_plan.runtime.tensor_parallel.weight_reads import (
    FUSED_IN_TRAINING,
    keep_from_fused_kernels,
    layers_fused,
    layers_read,
)


def mamba_inner_fn(*arguments: Any, **options: Any) -> Tensor | None:
    """Stands for a fused kernel."""
    raise RuntimeError("the fused kernel was called")


class Mixer(nn.Module):
    """Gives a weight to a fused kernel in training, and asks for the dtype of another."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(4, 8), nn.Linear(8, 4)
        assert self.in_proj.weight.mean() is not None  # before anything is sharded

    def forward(self, given: Tensor) -> Tensor:
        inner = self.in_proj(given.to(self.in_proj.weight.dtype))
        assert isinstance(self.in_proj.weight, Tensor) and self.in_proj.weight.shape[0] == 8
        if self.training:
            fused = mamba_inner_fn(inner, self.out_proj.weight.float())
            if fused is not None:
                return fused
        output: Tensor = self.out_proj(inner)
        return output


class Inherited(Mixer):
    """Reads nothing itself."""


class Multiplies(nn.Module):
    """Computes with the weight of its layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, given: Tensor) -> Tensor:
        return F.linear(given, self.proj.weight)


class OnlyIfSlow(nn.Module):
    """Computes with the weight of its layer where it is told to, as BLOOM does with `slow_but_exact`."""

    def __init__(self, slow: bool, pieces: int) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.slow, self.pieces = slow, pieces

    def forward(self, given: Tensor) -> Tensor:
        if self.pieces > 1 and self.slow:
            for _ in range(self.pieces):
                given = F.linear(given, self.proj.weight)
            return given
        output: Tensor = self.proj(given)
        return output if not self.slow else output + (0 * self.proj.weight.sum() if self.training else 0)


@pytest.mark.parametrize("cls", [Mixer, Inherited])
def test_what_a_fused_kernel_would_take_is_found(cls: type[nn.Module]) -> None:
    assert layers_fused(cls()) == {"out_proj"}
    assert layers_read(cls()) == set(), "dtype, shape and class do no harm, nor does what runs before"


def test_a_weight_that_code_computes_with_is_found() -> None:
    assert layers_read(Multiplies()) == {"proj"} and not layers_fused(Multiplies())


@pytest.mark.parametrize(("slow", "pieces", "read"), [(False, 1, False), (False, 2, False), (True, 2, True)])
def test_code_that_the_settings_of_a_module_switch_off_is_not_counted(slow: bool, pieces: int, read: bool) -> None:
    module = OnlyIfSlow(slow, pieces)
    module.training = False  # it changes, and decides nothing
    assert layers_read(module) == ({"proj"} if read else set())
    module.slow = True
    assert layers_read(module) == {"proj"}


def test_a_mixer_is_kept_from_its_fused_kernel() -> None:
    mixer = Mixer()
    with pytest.raises(RuntimeError, match="fused kernel"):
        mixer(torch.ones(2, 4))
    keep_from_fused_kernels(mixer)
    assert mixer(torch.ones(2, 4)).shape == (2, 4)
    assert mixer.training and mixer.in_proj.training and type(mixer).__name__ == "Mixer"
    with pytest.raises(RuntimeError):
        mixer(torch.ones(2, 5))
    assert mixer.training


MIXERS = {
    "bamba": "BambaMixer",
    "falcon_h1": "FalconH1Mixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "mamba2": "Mamba2Mixer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "zamba2": "Zamba2MambaMixer",
    "mamba": "MambaMixer",
    "falcon_mamba": "FalconMambaMixer",
}


@pytest.mark.parametrize("model_type", MIXERS)
def test_fused_kernels_of_transformers_are_known(model_type: str) -> None:
    """Where a mixer takes `out_proj.weight` itself, that is in the call of a function that this package knows."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    mixer = getattr(module, MIXERS[model_type]).__new__(getattr(module, MIXERS[model_type]))
    assert "out_proj" in layers_fused(mixer)
    assert not {"in_proj", "out_proj", "norm"} & layers_read(mixer)
    assert FUSED_IN_TRAINING & vars(module).keys()


def run_with_a_fused_kernel(folder: Path, plan_file: Path) -> dict[str, Any]:
    """What a rank computes in training where a fused kernel is there, and whether it is called by a mixer as it was."""
    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.loading import shard_model
    from tests.helpers.models import batch, load_dense

    tokens = batch(1)
    dense = load_dense(folder, torch.float64)
    expected = dense(tokens, labels=tokens, use_cache=False)
    expected.loss.backward()
    module = importlib.import_module("transformers.models.bamba.modeling_bamba")
    module.mamba2_split_conv1d_scan_combined = mamba_inner_fn  # type: ignore[attr-defined]
    plan = load_plan(plan_file)
    model: Any = plan.load_model(folder, dtype=torch.float64).train()
    found = model(tokens, labels=tokens, use_cache=False)
    found.loss.backward()
    name = "model.layers.0.mamba.out_proj.weight"
    gradient = dense.get_parameter(name).grad
    assert gradient is not None
    mine = gradient.chunk(plan.tp_size, dim=1)[plan.ranks.tp_rank]
    errors: dict[str, Any] = {
        "loss": abs(float(found.loss - expected.loss)),
        "gradient": float((model.get_parameter(name).grad - mine).abs().max()),
    }
    vars(shard_model)["skip_fused_kernels"] = lambda *_: None
    planted = plan.load_model(folder, dtype=torch.float64).train()
    try:
        planted(tokens, use_cache=False)
    except RuntimeError as error:
        errors["planted"] = str(error)
    return errors


@pytest.mark.distributed
@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore")
def test_a_sharded_mixer_is_kept_from_a_fused_kernel(tmp_path: Path) -> None:
    """Bamba in training: the all-reduce of `out_proj` takes place, whatever kernels are installed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from autotp_plan.inference.infer import infer_rules
    from autotp_plan.runtime.verify.random_inputs import randomise
    from tests.helpers.launch import launch
    from tests.helpers.mixers import mixer_folder
    from tests.inference.test_infer import inferred

    folder = tmp_path / "model"
    folder.mkdir()
    mixer_folder(folder, "bamba")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float64)
    randomise(model)
    model.to(torch.float32).save_pretrained(folder)
    plan = inferred(folder, 2, infer_rules(folder))
    (tmp_path / "plan.json").write_text(plan.to_json())
    for errors in launch(run_with_a_fused_kernel, 2, folder, tmp_path / "plan.json"):
        assert errors["loss"] < 1e-6 and errors["gradient"] < 1e-6, errors
        assert errors["planted"] == "the fused kernel was called", "without it the kernel takes the layer's weight"
