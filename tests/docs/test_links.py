"""Links in the documentation lead somewhere: on GitHub, and in the site. No site generator is needed for it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.site import FENCE, GENERATED, pages
from tests.helpers.paths import ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
WORKFLOW = re.compile(r"^\.\./\.\./actions/workflows/([\w.-]+\.yml)(/badge\.svg)?$")
FOLDERS = ("autotp_plan", "benchmarks", "docs", "examples", "scripts", "tests")
WRITTEN_BY_MKDOCSTRINGS = "api.md"


def documents() -> list[Path]:
    """Every Markdown file of the repository."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    return sorted([*found, *(path for folder in FOLDERS for path in (ROOT / folder).glob("README.md"))])


def prose(text: str) -> str:
    """Markdown without its blocks of code."""
    parts = FENCE.split(text)
    return "".join(parts[::3])


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as GitHub and Markdown's `toc` make them where both agree."""
    titles = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in HEADING.findall(prose(text)))
    return {re.sub(r" +", "-", re.sub(r"[^\w\- ]", "", title).strip()) for title in titles}


def broken(text: str, exists: set[str] | None, folder: str, texts: dict[str, str]) -> Iterator[str]:
    """Links of `text`, in `folder`, that lead nowhere: `exists` are the paths there are, None the repository's."""
    for link in LINK.findall(prose(text)):
        target, _, anchor = link.partition("#")
        if "://" in target or WORKFLOW.match(target):
            continue
        path = posixpath.normpath(posixpath.join(folder, target)) if target else None
        if path is not None and not ((ROOT / path).exists() if exists is None else path in exists):
            yield f"{link}: there is no {path}"
        elif anchor and anchor not in anchors(text if path is None else texts.get(path, "")):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_on_github(path: Path) -> None:
    texts = {str(one.relative_to(ROOT)): one.read_text(encoding="utf-8") for one in documents()}
    here = str(path.relative_to(ROOT))
    assert not list(broken(texts[here], None, posixpath.dirname(here), texts))


def test_links_in_the_site() -> None:
    staged = pages()
    files = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*") if path.suffix != ".md"}
    wrong = [
        f"{page}: {fault}"
        for page, text in staged.items()
        for fault in broken(text, {*staged, *files}, posixpath.dirname(page), staged)
    ]
    assert not wrong


def test_a_broken_link_is_found() -> None:
    text = "[a](docs/none.md) [b](README.md#none) [c](#here) [d](README.md#top)\n\n# Here\n\n```\n[e](none.md)\n```\n"
    found = list(broken(text, None, "", {"README.md": "# Top\n"}))
    assert [fault.split(":")[0] for fault in found] == ["docs/none.md", "README.md#none"]


def test_badges_name_workflows_that_there_are() -> None:
    folder = ROOT / ".github" / "workflows"
    names = [found[1] for link in LINK.findall((ROOT / "README.md").read_text()) if (found := WORKFLOW.match(link))]
    assert names
    assert not [name for name in names if not (folder / name).exists()]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path: Path) -> None:
    lines = [line for line in prose(path.read_text(encoding="utf-8")).splitlines() if "://" not in line]
    named = [code for line in lines for code in CODE.findall(line) if re.match(r"[\w.-]+/[\w./-]*$", code)]
    assert not [code for code in named if code.split("/")[0] in FOLDERS and not (ROOT / code).exists()]


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"^ +- [\w ]+: ([\w-]+\.md)$", text, re.MULTILINE))
    assert listed == {"index.md", *(path.name for path in (ROOT / "docs").glob("*.md"))}


def test_every_generated_part_is_used_once() -> None:
    from scripts.reference import PARTS

    used = [name for path in (ROOT / "docs").glob("*.md") for name in GENERATED.findall(path.read_text())]
    assert sorted(used) == sorted(PARTS)
