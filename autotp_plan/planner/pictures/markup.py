"""Markup from values: every text is escaped here, and there is no other way to make a tag.

What HTML and XML have in common is written, so that the same functions make a page and an SVG file.
"""

from __future__ import annotations

import re
from html import escape
from importlib import resources

from autotp_plan.schemas.errors import visible

LONGEST_NAME = 160
"""Characters of a name that are shown; the middle of a longer one is left out."""
_EMPTY = frozenset({"path", "line", "use", "meta", "br", "input", "circle"})
_NO_XML = re.compile("[\ufffe\uffff]")


class Markup(str):
    """Text that is markup, and not escaped again."""

    __slots__ = ()


def plain(text: str, longest: int = LONGEST_NAME) -> str:
    """A text as it may stand on a page: control characters and what turns text around written out, not too long.

    Args:
        text: any text, such as a name in a plan.
        longest: characters; from a longer text the middle is left out.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]}\u2026{text[-longest // 2 :]}"
    return _NO_XML.sub("\ufffd", visible(text))


def tag(name: str, /, *children: str, **attributes: str | float | bool | None) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: its contents: `Markup` as it is, any other text escaped.
        attributes: `class_` for `class`, `data_name` for `data-name`; None and False are left out, True has no value.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        text = f"{value:.5g}" if isinstance(value, float) else str(value)
        words.append(f'{key}=""' if value is True else f'{key}="{escape(plain(text, 100_000))}"')
    start = " ".join(words)
    if name in _EMPTY or (name == "rect" and not children):
        return Markup(f"<{start}/>")
    return Markup(f"<{start}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Elements and texts one after the other, the texts escaped."""
    return Markup("".join(one if isinstance(one, Markup) else escape(plain(one, 100_000)) for one in children))


def data_text(name: str) -> str:
    """A style sheet or a script of this folder."""
    return resources.files("autotp_plan.planner.pictures").joinpath(name).read_text(encoding="utf-8")
