"""Models with images, and with mixers that are not attention: trained as the dense ones, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner.sequence_parallel import with_sequence_parallel
from tests.helpers.launch import launch
from tests.helpers.mixers import CONFIGS
from tests.helpers.sequences import errors, save_dense, write
from tests.helpers.wrappers import INFERRED, OTHERS, WRAPPERS, save_wrapper
from tests.planner.fallback.test_tp_plan import right

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

REFUSED = {"gemma4": "must match the size"}
"""Its layers are given features of every token as another argument than their first."""
QUICK = ("qwen3_vl",)
"""Features of images are added between its layers."""


def prepare(work: Path, variant: str) -> None:
    """`variant/`, `variant.tp2`, and the dense model's numbers, with images where it takes some."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from autotp_plan.inference.infer import infer_rules
    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime.verify.float64_passes import EXPERTS
    from autotp_plan.runtime.verify.random_inputs import Batches, images_for

    folder, options = work / variant, dict[str, Any](EXPERTS)
    if variant in CONFIGS:
        save_mixer(folder, variant)
        dense: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).train()
        batches = Batches(vocab_size=240, length=12, padding=0, uneven=True)
    else:
        save_wrapper(folder, variant, torch.float64)
        dense = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, **options).train()
        batches = Batches(vocab_size=240, length=8, padding=0, images=images_for(dense), uneven=True)
        assert batches.images is not None
    plan = with_sequence_parallel(compile_plan(folder, tp_size=2, prove=right, infer=infer_rules))
    write(work, variant, 2, plan)
    save_dense(work, variant, dense, batches)


def save_mixer(folder: Path, variant: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from autotp_plan.runtime.verify.random_inputs import randomise
    from tests.helpers.mixers import mixer_folder

    folder.mkdir()
    mixer_folder(folder, variant)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float64)
    randomise(model)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    "variants",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param((*WRAPPERS, *OTHERS), id="with images", marks=(pytest.mark.sweep, pytest.mark.slow)),
        pytest.param((*CONFIGS, *INFERRED), id="inferred", marks=(pytest.mark.sweep, pytest.mark.slow)),
    ],
)
def test_every_number_is_the_dense_models(tmp_path: Path, variants: tuple[str, ...]) -> None:
    for variant in variants:
        prepare(tmp_path, variant)
    for found in launch(errors, 2, tmp_path, {variant: variant for variant in variants}, 2):
        for variant, of in found.items():
            wrong = [name for name, error in of.items() if error > 1e-9]
            if variant in REFUSED:
                assert len(wrong) == 1 and REFUSED[variant] in wrong[0]
            else:
                assert not wrong, variant
