"""What `mkdocs build` does beyond Markdown: a hook, named in mkdocs.yml.

- The home page is README.md.
- `<!-- generated: NAME -->` becomes what `scripts.reference` makes from the code.
- A link to a file of the repository (`../schemas/plan.schema.json`, `../examples/basic.py`) works on GitHub as it is.
  In the site it leads to a page that shows the file, so that the site is complete without a network.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from scripts.reference import PARTS

ROOT = Path(__file__).parent.parent
GENERATED = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
LINK = re.compile(r"(?<!`)(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
BADGES = re.compile(r"<!-- badges -->.*?<!-- /badges -->\n", re.DOTALL)
LANGUAGES = {".py": "python", ".json": "json", ".md": "markdown", ".toml": "toml"}


def on_files(files: Files, config: Any) -> Files:
    """Add the home page and a page for each file of the repository that a page links to."""
    home = BADGES.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "index.md", content=_links(home, "README.md", files, config)))
    for file in [file for file in files.documentation_pages() if file.src_uri != "index.md"]:
        text = GENERATED.sub(lambda found: PARTS[found[1]](), file.content_string)
        file.content_string = _links(text, f"docs/{file.src_uri}", files, config)
    return files


def _links(text: str, path: str, files: Files, config: Any) -> str:
    """`text`, which is the file `path` of the repository, with its links as the site needs them."""
    page = _page(path)
    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(lambda found: found[1] + _target(found[2], path, page, files, config) + found[3], part)
                  for part in parts[::2]]  # fmt: skip
    return "".join(parts)


def _page(path: str) -> str:
    """The source path, in the site, of what is `path` in the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def _target(target: str, path: str, page: str, files: Files, config: Any) -> str:
    if "://" in target or target.startswith("mailto:"):
        return target
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    if (ROOT / wanted).is_file():
        _add(wanted, files, config)
    return posixpath.relpath(_page(wanted), posixpath.dirname(page) or ".")


def _add(path: str, files: Files, config: Any) -> None:
    """The page that shows the repository's file `path`; pages of the documentation are there already."""
    page = _page(path)
    if path.startswith("docs/") or page == "index.md" or files.get_file_from_path(page) is not None:
        return
    text = (ROOT / path).read_text(encoding="utf-8")
    file = File.generated(config, page, content="")
    files.append(file)
    if path.endswith(".md"):
        file.content_string = _links(text, path, files, config)
        return
    language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
    ticks = "`" * (3 + max((len(run) for run in re.findall("`{3,}", text)), default=0))
    file.content_string = f"# {path}\n\n{ticks}{language}\n{text}\n{ticks}\n"
