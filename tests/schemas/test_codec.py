"""Dataclasses to JSON values and back: nothing is lost, defaults are not written, keys keep the order of the fields."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from autotp_plan.schemas.codec import decode, encode


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    left: int
    right: int

    @classmethod
    def from_value(cls, value: list[int]) -> Pair:
        return cls(left=value[0], right=value[1])

    def to_value(self) -> list[int]:
        return [self.left, self.right]


@dataclass(frozen=True, kw_only=True, slots=True)
class Word:
    """Written as a string or as an object, as collectives of modules are."""

    text: str

    @classmethod
    def from_value(cls, value: str | dict[str, str]) -> Word:
        return cls(text=value if isinstance(value, str) else value["text"])

    def to_value(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    name: str
    note: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    must: str | None
    leaf: Leaf | None = None
    leaves: tuple[Leaf, ...] = ()
    by_name: dict[str, Leaf] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()
    word: Word | None = None
    interval: tuple[int, str] | None = None
    shape: tuple[int | tuple[int | str, ...], ...] | None = None
    flag: bool = False


@pytest.mark.parametrize(
    ("tree", "value"),
    [
        (Tree(must=None), {"must": None}),
        (Tree(must="x", leaf=Leaf(name="a", note="")), {"must": "x", "leaf": {"name": "a", "note": ""}}),
        (Tree(must="x", leaves=(Leaf(name="a"), Leaf(name="b"))),
         {"must": "x", "leaves": [{"name": "a"}, {"name": "b"}]}),
        (Tree(must="x", by_name={"k": Leaf(name="a")}), {"must": "x", "by_name": {"k": {"name": "a"}}}),
        (Tree(must="x", pairs=(Pair(left=1, right=2),)), {"must": "x", "pairs": [[1, 2]]}),
        (Tree(must="x", word=Word(text="w")), {"must": "x", "word": "w"}),
        (Tree(must="x", interval=(3, "n")), {"must": "x", "interval": [3, "n"]}),
        (Tree(must="x", shape=((1, "q"), -1)), {"must": "x", "shape": [[1, "q"], -1]}),
        (Tree(must="x", shape=()), {"must": "x", "shape": []}),
        (Tree(must="x", flag=True), {"must": "x", "flag": True}),
    ],
)  # fmt: skip
def test_there_and_back(tree: Tree, value: object) -> None:
    assert encode(tree) == value
    assert decode(Tree, value) == tree


def test_keys_have_the_order_of_the_fields() -> None:
    value = decode(Tree, {"flag": True, "leaf": {"note": "n", "name": "a"}, "must": "x"})
    assert list(encode(value)) == ["must", "leaf", "flag"]
    assert list(encode(value)["leaf"]) == ["name", "note"]


def test_a_class_may_be_written_in_two_ways() -> None:
    assert decode(Tree, {"must": "x", "word": {"text": "w"}}).word == Word(text="w")
    assert decode(Tree, {"must": "x", "word": None}).word is None


def test_a_key_with_its_default_may_be_there() -> None:
    assert decode(Tree, {"must": "x", "flag": False, "leaf": None}) == Tree(must="x")


def test_what_the_schema_should_have_refused_is_not_read_in_silence() -> None:
    with pytest.raises(KeyError):
        decode(Tree, {"must": "x", "unknown": 1})
    with pytest.raises(ValueError, match="zip"):
        decode(Tree, {"must": "x", "interval": [1]})
