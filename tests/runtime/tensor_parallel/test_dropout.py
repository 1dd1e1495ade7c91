"""Which models drop out, and so need the ranks to draw the same random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autotp_plan.runtime.tensor_parallel.dropout_rng import has_dropout
from tests.helpers.models import PRESET_VARIANTS, make_config


def on_meta(variant: str, **changes: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(make_config(variant, **changes))
    return model


def dropout_settings(variant: str) -> list[str]:
    """The probabilities in a family's config whose name has to do with dropping out."""
    config = make_config(variant).to_dict()
    return [key for key, value in config.items() if "drop" in key and type(value) in (float, int)]


def any_attribute_with_drop_in_it(model: nn.Module) -> bool:
    """What is asked for, in the widest sense; too wide for code, as `backdrop` or `dropped_tokens` would count too."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or any("drop" in name and type(value) is float and value > 0 for name, value in vars(module).items())
        for module in model.modules()
    )


@pytest.mark.parametrize("variant", PRESET_VARIANTS)
def test_every_family_is_found_to_drop_out_where_its_config_says_so(variant: str) -> None:
    settings = dropout_settings(variant)
    cases: list[dict[str, Any]] = [{}, dict.fromkeys(settings, 0.0), *({name: 0.25} for name in settings)]
    for changes in cases:
        model = on_meta(variant, **changes)
        assert has_dropout(model) is any_attribute_with_drop_in_it(model), changes


def test_families_that_drop_out_are_among_them() -> None:
    assert has_dropout(on_meta("llama", attention_dropout=0.1))
    assert has_dropout(on_meta("gpt2", resid_pdrop=0.1))
    assert has_dropout(on_meta("opt", dropout=0.1))
    assert not has_dropout(on_meta("llama"))


@pytest.mark.parametrize("cls", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_modules_of_torch(cls: type[nn.Module]) -> None:
    assert has_dropout(nn.Sequential(cls(0.1)))
    assert not has_dropout(nn.Sequential(cls(0.0)))


@pytest.mark.parametrize(
    ("attribute", "value", "drops"),
    [
        ("attention_dropout", 0.1, True),
        ("attn_dropout_p", 0.1, True),
        ("resid_pdrop", 0.1, True),
        ("layerdrop", 0.1, True),
        ("drop_prob", 0.1, True),
        ("attention_dropout", 0.0, False),
        ("attention_dropout", True, False),
        ("dropped_tokens", 3.0, False),
        ("backdrop", 1.0, False),
    ],
)
def test_attributes_of_modules(attribute: str, value: float, drops: bool) -> None:
    module = nn.Linear(1, 1)
    setattr(module, attribute, value)
    assert has_dropout(module) is drops
