"""Stages the documentation site: `python -m scripts.site` writes `build/docs/`, which mkdocs turns into HTML.

- The home page is README.md.
- A line `<!-- generated: NAME -->` becomes what `scripts.reference` makes from the code.
- A link to a file of the repository (`../schemas/plan.schema.json`, `../examples/basic.py`) works on GitHub as it is.
  In the site it leads to a page that shows the file, so that the site is complete without a network.

It needs no site generator, so that the quick tests can read every page as the site will have it.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path

from scripts.reference import PARTS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
STAGE = ROOT / "build" / "docs"
GENERATED = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"(^ *(`{3,}).*?^ *\2$)", re.MULTILINE | re.DOTALL)
BADGES = re.compile(r"<!-- badges -->.*?<!-- /badges -->\n", re.DOTALL)
WIDE = {"families.md", "benchmark.md"}
"""Pages of wide tables: without the column for the table of contents."""
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml"}


def pages() -> dict[str, str]:
    """Every page of the site: its path in the site -> its Markdown."""
    found: dict[str, str] = {}
    waiting = ["README.md", *(f"docs/{path.name}" for path in sorted(DOCS.glob("*.md")))]
    while waiting:
        path = waiting.pop()
        if page_of(path) not in found:
            text, linked = rewrite(source(path), path)
            found[page_of(path)] = text
            waiting += linked
    return found


def page_of(path: str) -> str:
    """The path in the site of what is `path` in the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def source(path: str) -> str:
    """The Markdown of one page: a Markdown file with its generated parts, or another file as a block of code."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return GENERATED.sub(lambda found: PARTS[found[1]](), BADGES.sub("", text))
    ticks = "`" * (1 + max(2, *map(len, re.findall("`+", text)), 0))
    return f"# {path}\n\n{ticks}{LANGUAGES.get(posixpath.splitext(path)[1], 'text')}\n{text}\n{ticks}\n"


def rewrite(text: str, path: str) -> tuple[str, list[str]]:
    """The text of the page for `path` with links as the site needs them, and the files that get a page for it."""
    linked: list[str] = []

    def target(found: re.Match[str]) -> str:
        if "://" in found[2]:
            return found[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(path), found[2]))
        if wanted.startswith("docs/"):
            page = wanted.removeprefix("docs/")
        else:
            linked.append(wanted)
            page = page_of(wanted)
        return found[1] + posixpath.relpath(page, posixpath.dirname(page_of(path)) or ".") + found[3]

    code = FENCE.split(text)  # text, fence, its backticks, text, ...
    del code[2::3]
    code[::2] = [LINK.sub(target, part) for part in code[::2]]
    return "".join(code), linked


def main() -> None:
    """Write the pages, and everything in `docs/` that is not a page, to `build/docs/`."""
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(DOCS, STAGE, ignore=shutil.ignore_patterns("*.md", "benchmark.json", "scale.json", "estimate.json"))
    for page, text in pages().items():
        file = STAGE / page
        file.parent.mkdir(parents=True, exist_ok=True)
        front = "---\nhide: [toc]\n---\n\n" if page in WIDE else ""
        file.write_text(front + text, encoding="utf-8")


if __name__ == "__main__":
    main()
