"""Faults of one compile: the same mistake in many layers is told once, and two mistakes are never one."""

from __future__ import annotations

from autotp_plan.schemas.errors import Fault
from autotp_plan.schemas.fault_book import FaultBook


def test_layers_fold_and_the_rule_follows_the_name() -> None:
    book = FaultBook()
    for layer in (0, 1, 2, 5):
        book.add("c", "wrong", f"l.{layer}.w", "preset x #1", got="g", expected="e", next="n")
    assert book.faults() == [
        Fault(code="c", what="wrong", where="l.{0..2,5}.w (preset x #1)", got="g", expected="e", next="n")
    ]


def test_a_fault_of_a_rule_has_no_name() -> None:
    book = FaultBook()
    assert not book
    book.add("c", "wrong", rule="spec a.1 (b) #1")
    assert [fault.where for fault in book.faults()] == ["spec a.1 (b) #1"]
    assert book


def test_names_in_what_was_got_fold_too() -> None:
    book = FaultBook()
    for layer in range(3):
        book.add("c", "wrong", f"l.{layer}.w", got=f"like l.{layer}.v and l.{layer}.vv", mentions=(
            f"l.{layer}.v", f"l.{layer}.vv"))  # fmt: skip
    assert [(fault.where, fault.got) for fault in book.faults()] == [("l.{0..2}.w", "like l.{0..2}.v and l.{0..2}.vv")]


def test_one_name_may_be_mentioned_by_all() -> None:
    book = FaultBook()
    for layer in range(3):
        book.add("c", "wrong", f"l.{layer}.w", got="not like head.w", mentions=("head.w",))
    assert [(fault.where, fault.got) for fault in book.faults()] == [("l.{0..2}.w", "not like head.w")]


def test_what_differs_is_not_folded() -> None:
    book = FaultBook()
    book.add("c", "wrong", "l.0.w", got="1")
    book.add("c", "wrong", "l.1.w", got="2")
    book.add("c", "wrong", "l.2.w", "rule", got="1")
    book.add("d", "wrong", "l.3.w", got="1")
    book.add("c", "wrong", "l.4.w", got="like l.4.a", mentions=("l.4.a",))
    book.add("c", "wrong", "l.4.w", got="like l.4.b", mentions=("l.4.b",))
    assert len(book.faults()) == 6
