"""A model whose stream is sharded along the sequence is the dense one: loss, logits, every gradient, accumulated ones,
and parameters after optimizer steps, for lengths that the number of ranks divides and for others.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.launch import launch
from tests.helpers.models import PRESET_VARIANTS
from tests.helpers.sequences import Lengths, errors, save_case

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

QUICK = {
    2: ("llama", "gpt2", "mixtral", "bloom", "deepseek_v3"),
    4: ("llama",),
}
"""Biases and transposed weights, experts, latent attention."""
LENGTHS = Lengths((12, 13, 3))
"""13 is uneven on 2 ranks and 4, and of 3 tokens the last of 4 ranks holds none."""
SWEEP = (pytest.mark.sweep, pytest.mark.slow)


@pytest.mark.parametrize(
    ("variants", "tp_size"),
    [
        pytest.param(QUICK[2], 2, id="tp2"),
        pytest.param(QUICK[4], 4, id="tp4"),
        pytest.param(tuple(PRESET_VARIANTS), 2, id="every-preset-tp2", marks=SWEEP),
        pytest.param(tuple(PRESET_VARIANTS), 4, id="every-preset-tp4", marks=SWEEP),
    ],
)
def test_every_number_is_the_dense_models(tmp_path: Path, variants: tuple[str, ...], tp_size: int) -> None:
    for variant in variants:
        save_case(tmp_path, variant, (tp_size,), LENGTHS)
    for found in launch(errors, tp_size, tmp_path, {variant: variant for variant in variants}, tp_size, LENGTHS):
        assert found.keys() == set(variants)
        wrong = {
            variant: max(of.items(), key=lambda one: one[1]) for variant, of in found.items() if max(of.values()) > 1e-9
        }
        assert not wrong
