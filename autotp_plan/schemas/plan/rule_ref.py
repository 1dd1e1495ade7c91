"""Which rule decided a parameter: where the rule was written, and its number there.

A plan file holds a rule as text (`preset llama #1`). That text is read and written here and nowhere else; all other
code compares `origin`, `name` and `index`.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass


class Origin(enum.Enum):
    """Where a rule was written. The value is how its text begins."""

    SPEC = "spec"
    DS_CONFIG = "ds-config"
    PRESET = "preset"
    TP_PLAN = "tp_plan of transformers"
    OWN_TP_PLAN = "tp_plan of the model"
    INFERENCE = "inference"
    DEFAULT = "default for 1-D"
    REST = "no rule"
    UNKNOWN = ""


class Section(enum.Enum):
    """The list of a preset or spec file that a rule is in. The value is how the text names it."""

    LAYERS = ""
    VOCABULARY = "vocabulary"
    MODULE_ATTRIBUTES = "module_attributes"
    MODULES = "modules"


_SECTIONS = "|".join(section.value for section in Section if section.value)
_PRESET = re.compile(rf"preset (\S+)(?: ({_SECTIONS}))? #([1-9][0-9]*)")
_SPEC = re.compile(r"spec (.+) #([1-9][0-9]*)", re.DOTALL)
_UNNAMED = re.compile(rf"({Origin.DS_CONFIG.value}|{Origin.TP_PLAN.value}|{Origin.OWN_TP_PLAN.value}) #([1-9][0-9]*)")
_INFERRED = re.compile(rf"{Origin.INFERENCE.value}(?: ({_SECTIONS}))? #([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class RuleRef:
    """A rule by where it was written.

    `name` is the preset's or the spec file's, `index` counts from 1 within the section. A text that no version of the
    planner writes has the origin UNKNOWN, and is kept in `name` as it is.
    """

    origin: Origin
    name: str = ""
    index: int = 0
    section: Section = Section.LAYERS

    @classmethod
    def from_value(cls, text: str) -> RuleRef:
        """The rule that a plan file calls `text`: `str` of the result is `text` again, whatever it is."""
        if text == Origin.DEFAULT.value:
            return DEFAULT_RULE
        if text == Origin.REST.value:
            return REST_RULE
        if match := _PRESET.fullmatch(text):
            return cls(Origin.PRESET, match[1], int(match[3]), Section(match[2] or ""))
        if match := _SPEC.fullmatch(text):
            return cls(Origin.SPEC, match[1], int(match[2]))
        if match := _INFERRED.fullmatch(text):
            return cls(Origin.INFERENCE, "", int(match[2]), Section(match[1] or ""))
        if match := _UNNAMED.fullmatch(text):
            return cls(Origin(match[1]), "", int(match[2]))
        return cls(Origin.UNKNOWN, text)

    def to_value(self) -> str:
        """The text that plan files hold."""
        return str(self)

    def __str__(self) -> str:
        """`preset llama vocabulary #2`, `spec file #1`, `ds-config #3`, `default for 1-D`."""
        words = " ".join(filter(None, (self.origin.value, self.name, self.section.value)))
        return f"{words} #{self.index}" if self.index else words


DEFAULT_RULE = RuleRef(Origin.DEFAULT)
"""What decides a parameter of at most one dimension that no rule matches: replicated on every rank."""
REST_RULE = RuleRef(Origin.REST)
"""What decides a weight that a DeepSpeed config or a `tp_plan` of one's own does not name: replicated on every rank."""
NO_RULE = RuleRef(Origin.UNKNOWN)
"""For plans that are not made by rules; its text is empty."""
