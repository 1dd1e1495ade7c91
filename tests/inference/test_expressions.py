"""Sizes of two models as expressions: the simplest one, and none that is right in one model only."""

from __future__ import annotations

import pytest

from autotp_plan.inference.spec.expressions import Expressions, Values

MODELS = (
    {"hidden_size": 48, "num_heads": 8, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 20, "pad_token_id": 9},
    {"hidden_size": 84, "num_heads": 6, "num_kv_heads": 3, "head_dim": 24, "intermediate_size": 34, "pad_token_id": 7},
)


def expressions() -> Expressions:
    return Expressions.of(MODELS, ())


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((20, 34), "intermediate_size"),
        ((40, 68), "2 * intermediate_size"),
        ((128, 144), "head_dim * num_heads"),
        ((4, 2), "num_heads // num_kv_heads"),
        ((96, 96), "(num_heads // num_kv_heads + 2) * head_dim"),
        ((68, 118), "hidden_size + intermediate_size"),
        ((9, 7), None),
        ((20, 35), None),
    ],
)
def test_the_simplest_expression(values: Values, text: str | None) -> None:
    assert expressions().find(values) == text


def test_an_unknown_size_fits_any() -> None:
    third = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 96}
    three = Expressions.of([*MODELS, third], ())
    assert three.find((128, 144, None)) == "head_dim * num_heads"
    assert three.find((128, 144, 64)) == "head_dim * num_heads"
    assert three.find((128, 144, 65)) is None, "right in the small models, and wrong in the original"


def test_a_defined_name_comes_first() -> None:
    found = Expressions(names={"d_model": (64, 96), "n_heads": (8, 6), "d_ff": (20, 34)})
    assert found.find((8, 16)) == "d_model // n_heads"
    found.define("head_dim", "d_model // n_heads")
    assert found.find((16, 32)) == "2 * head_dim"
    assert found.find((8, 16)) == "head_dim"


def test_the_keys_that_config_json_has_are_preferred() -> None:
    both = [{"n_embd": 48, "hidden_size": 48}, {"n_embd": 84, "hidden_size": 84}]
    assert Expressions.of(both, ("n_embd",)).find((48, 84)) == "n_embd"
    assert Expressions.of(both, ("hidden_size",)).find((48, 84)) == "hidden_size"
