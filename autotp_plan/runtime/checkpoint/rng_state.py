"""The random state of a process (torch's on CPU and accelerator, numpy's, Python's), to a file and back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

RandomState = tuple[dict[str, Tensor], dict[str, Any]]
"""The state of a process's random number generators as it was read: torch's and numpy's, and what is not a tensor."""


def save_rng_state(path: Path) -> None:
    """Write the state of this process's random number generators to `path`, a safetensors file."""
    of_numpy: Any = np.random.get_state(legacy=False)
    words = torch.from_numpy(of_numpy["state"]["key"].astype(np.int64))
    tensors = {"torch": torch.get_rng_state(), "numpy": words}
    if get_accelerator().device_name() != "cpu":
        tensors["accelerator"] = get_accelerator().get_rng_state()
    rest = {
        "numpy": [of_numpy["state"]["pos"], of_numpy["has_gauss"], of_numpy["gauss"]],
        "python": random.getstate(),
    }
    save_file(tensors, path, {"streams": json.dumps(rest)})


def read_rng_state(path: Path) -> RandomState:
    """The state that `save_rng_state` wrote to `path`."""
    with safe_open(path, "pt") as file:
        rest = json.loads(file.metadata()["streams"])
        return {name: file.get_tensor(name).clone() for name in file.keys()}, rest  # noqa: SIM118 - not a mapping


def restore_rng_state(state: RandomState) -> None:
    """Put this process's random number generators into a state that was read."""
    tensors, rest = state
    torch.set_rng_state(tensors["torch"])
    if "accelerator" in tensors:
        get_accelerator().set_rng_state(tensors["accelerator"])
    position, has_gauss, gauss = rest["numpy"]
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, of_python, gauss_next = rest["python"]
    random.setstate((version, tuple(of_python), gauss_next))


def seed_from_rng_state(state: RandomState, dp_rank: int) -> None:
    """Seed this process's random number generators with a number that follows from a saved state and the DP rank.

    For a job that resumes on a different mesh: all TP ranks of a DP rank get the same seed.
    """
    restore_rng_state(state)
    seed = int(torch.randint(2**31, ())) + dp_rank
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
