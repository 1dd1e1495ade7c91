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


def load_rng_state(path: Path) -> None:
    """Put this process's random number generators into the state that `save_rng_state` wrote to `path`."""
    with safe_open(path, "pt") as file:
        rest = json.loads(file.metadata()["streams"])
        torch.set_rng_state(file.get_tensor("torch"))
        if "accelerator" in file.keys():  # noqa: SIM118 - not a mapping
            get_accelerator().set_rng_state(file.get_tensor("accelerator"))
        position, has_gauss, gauss = rest["numpy"]
        words = file.get_tensor("numpy").numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, gauss))
    version, state, gauss_next = rest["python"]
    random.setstate((version, tuple(state), gauss_next))


def seed_from_rng_state(path: Path, dp_rank: int) -> None:
    """Seed this process's random number generators with a number that follows from a saved state and the DP rank.

    For a job that resumes on a different mesh: all TP ranks of a DP rank get the same seed.
    """
    load_rng_state(path)
    seed = int(torch.randint(2**31, ())) + dp_rank
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
