"""What a comparison finds: differences by name, each with the fields that changed. Data, and its JSON.

A `Fact` is one thing that a plan says of a name; a `FieldChange` is two facts of one kind that are not the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from autotp_plan.schemas.errors import Fault, OptionError

Kind = Literal["added", "removed", "changed"]

RECORDS = frozenset({"version", "ignored", "note", "compiled from", "compiled by", "verified"})
"""Kinds of differences that no rank computes with."""
MOST_JSON = 1_000_000_000
"""Characters of the values in a JSON; those of plans of real models are some thousands."""
_RECORDED_FIELDS = frozenset({"rule"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One thing that a document says of a name.

    Attributes:
        key: what it is, in the JSON of differences: `bytes_per_rank`.
        title: the same in the words of `show`: `per rank`.
        json: its value as JSON text, which tells any two values apart.
        words: its value for people.
        content: what the value refers to, where that is known: the text of a rule.
    """

    key: str
    title: str
    json: str
    words: str
    content: str | None = None

    @property
    def value(self) -> Any:
        """The value that `json` is the text of."""
        return json.loads(self.json)


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldChange:
    """A fact before and after; None where the document has no such fact.

    `shown` is False where another change of the same name says it in the table; the JSON has it all the same.
    """

    old: Fact | None
    new: Fact | None
    shown: bool = True

    @property
    def fact(self) -> Fact:
        """The one of the two that is there."""
        found = self.new or self.old
        assert found is not None, "a change has at least one side"
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What changed of one name, or of several layers when `name` has braces.

    Attributes:
        of: what the name is of: `parameter`, `tied`, `config`, ...
        name: the name; layers are folded.
        count: how many names that is.
        kind: whether the name is new, is gone, or is in both.
        fields: what changed; all that the document says of a name that is new or gone.
    """

    of: str
    name: str
    count: int
    kind: Kind
    fields: tuple[FieldChange, ...] = ()

    @property
    def is_computed(self) -> bool:
        """Whether what a rank holds or computes depends on it."""
        if self.of in RECORDS:
            return False
        return self.kind != "changed" or any(field.fact.key not in _RECORDED_FIELDS for field in self.fields)

    def to_dict(self) -> dict[str, Any]:
        """`{"of", "name", "count", "kind", "fields": [{"field", "old", "new"}]}`; without a side that is not there."""
        fields = []
        for field in self.fields:
            sides = {"old": field.old, "new": field.new}
            values = {side: fact.value for side, fact in sides.items() if fact is not None}
            fields.append({"field": field.fact.key, **values})
        return {"of": self.of, "name": self.name, "count": self.count, "kind": self.kind, "fields": fields}


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the two documents: its headline, and the fingerprint of a plan; a checkpoint has none."""

    headline: str
    num_parameters: int
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Differences:
    """What changed between two documents, in the order in which a plan says it."""

    old: Side
    new: Side
    found: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Whether the documents say the same; they may still be written in different ways."""
        return not self.found

    @property
    def computes_the_same(self) -> bool:
        """Whether all that a rank holds and computes is the same under both."""
        return not any(one.is_computed for one in self.found)

    def to_dict(self) -> dict[str, Any]:
        """`{"equal", "computes_the_same", "old", "new", "differences"}`, for programs."""
        return {**self._summary(), "differences": [one.to_dict() for one in self.found]}

    def json_pieces(self) -> Iterator[str]:
        """The JSON text of `to_dict`, difference by difference, so that it need not be in memory.

        Raises:
            OptionError: it would be longer than `MOST_JSON` characters.
        """
        facts = (fact for one in self.found for field in one.fields for fact in (field.old, field.new))
        size = sum(len(fact.json) for fact in facts if fact is not None)
        if size > MOST_JSON:
            raise OptionError(
                Fault(
                    code="differences-too-long",
                    what="the differences are too long to be printed as JSON",
                    where="--format",
                    got=f"{size} characters",
                    expected=f"at most {MOST_JSON}",
                    next="use the table",
                )
            )
        return self._json_pieces()

    def _json_pieces(self) -> Iterator[str]:
        yield json.dumps(self._summary(), indent=1).removesuffix("\n}") + ',\n "differences": ['
        between = "\n  "
        for one in self.found:
            yield between + json.dumps(one.to_dict(), indent=1).replace("\n", "\n  ")
            between = ",\n  "
        yield "\n ]\n}" if self.found else "]\n}"

    def _summary(self) -> dict[str, Any]:
        sides = {
            name: {"headline": side.headline, "fingerprint": side.fingerprint}
            for name, side in (("old", self.old), ("new", self.new))
        }
        return {"equal": self.equal, "computes_the_same": self.computes_the_same, **sides}
