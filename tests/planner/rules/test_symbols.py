"""Expressions over a config: what they are worth, and why the others are refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotp_plan.planner.rules.symbols import SymbolError, Symbols

CONFIG = {"hidden_size": 64, "heads": 8, "flag": True, "theta": 1e4, "nothing": None, "name": "x", "zero": 0}


def symbols(**definitions: Any) -> Symbols:
    return Symbols(
        config=CONFIG, definitions={name: v if isinstance(v, tuple) else (v,) for name, v in definitions.items()}
    )


@pytest.mark.parametrize(
    ("size", "value"),
    [
        (7, 7), ("7", 7), ("hidden_size", 64), ("hidden_size // heads", 8), ("3 * (heads + 2) - 1", 29),
        (" 2*heads ", 16), ("head_dim * heads", 64), ("first", 64), ("own", 8), ("fallback", 5),
    ],
)  # fmt: skip
def test_sizes_resolve_through_symbols_and_config(size: int | str, value: int) -> None:
    found = symbols(
        head_dim=("head_dim", "hidden_size // heads"), first=("hidden_size", "heads"), own="own_heads",
        own_heads=("missing", "heads"), fallback=("missing", 5),
    )  # fmt: skip
    assert found.resolve(size) == value


def test_precedence_of_names() -> None:
    found = symbols(heads=4)
    assert found.resolve("heads") == 4, "a symbol wins over a config key"
    assert found.resolve("heads", {"heads": 2}) == 2, "what the compiler gives wins over both"


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("hiden_size", "the config has no 'hiden_size'; did you mean \"hidden_size\"?"),
        ("flag", "the config's 'flag' is True, not an integer"),
        ("theta", "the config's 'theta' is 10000.0, not an integer"),
        ("nothing", "the config has no 'nothing'"),
        ("heads // zero", "divides by zero"),
        ("heads / 2", "is not allowed"), ("heads ** 2", "is not allowed"), ("-1", "is not allowed"),
        ("len('x')", "is not allowed"), ("heads.__class__", "the config has no 'heads.__class__'"),
        ("[1][0]", "is not allowed"),
        ("True", "is not allowed"), ("1.5", "is not allowed"), ("(lambda: 1)()", "is not allowed"),
        ("heads +", "is not an expression"), ("", "is not an expression"), ("1\n+1", "is not an expression"),
        ("a = 1", "is not an expression"), ("\0", "is not an expression"), ("(" * 150, "is not an expression"),
        ("1" * 201, "an expression of 201 characters"), ("heads * " * 20 + "9" * 30, "too large for a size"),
        ("loop_a", "the config has no"), ("self", "the config has no 'self'"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_resolved_are_refused(size: str, message: str) -> None:
    with pytest.raises(SymbolError) as caught:
        symbols(loop_a="loop_b", loop_b="loop_a + 1", self="self").resolve(size)
    assert message in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_a_number_or_a_reason(text: str) -> None:
    with contextlib.suppress(SymbolError):
        assert isinstance(symbols().resolve(text), int)


@given(st.lists(st.tuples(st.sampled_from(["+", "-", "*", "//"]), st.integers(1, 9)), max_size=5))
def test_arithmetic_is_pythons(steps: list[tuple[str, int]]) -> None:
    text = "heads" + "".join(f" {operator} {value}" for operator, value in steps)
    assert symbols().resolve(text) == eval(text, {"heads": 8})


def test_a_flag_is_true_only_where_the_config_says_so() -> None:
    assert symbols().config_flag("flag")
    assert not symbols().config_flag("nothing")
    assert not symbols().config_flag("missing")


def test_max_and_min_are_the_only_functions() -> None:
    symbols = Symbols(config={"num_heads": 8, "num_kv_heads": 2})
    assert symbols.resolve("num_heads // max(num_kv_heads, tp_size)", {"tp_size": 4}) == 2
    assert symbols.resolve("min(num_heads, 3, 5)") == 3
    for wrong in ("max()", "abs(1)", "max(1, key=2)", "max.real(1)", "max(*x)", "__import__('os')"):
        with pytest.raises(SymbolError):
            symbols.resolve(wrong)
