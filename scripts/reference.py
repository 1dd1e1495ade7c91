"""The parts of the documentation that are made from the code, so that no copy of it can go stale.

The command-line reference comes from the click commands, the tables of fields from the JSON schemas, the file tree from
the first lines of the modules' docstrings, the list of presets from the presets. `scripts.site` puts them into the
site; `python -m scripts.reference tree` (or `cli`, `plan`, `shards`, `presets`) prints one.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from autotp_plan.planner.cli.main import main as command_line
from autotp_plan.planner.rules.preset_files import preset_names, read_preset

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "autotp_plan"
ROOMS = ("schemas", "dequantize", "sources", "huggingface", "factories", "inference", "planner", "runtime")
OTHER_FOLDERS = {
    "autotp_plan/plans/": "compiled plans of public models, each with the config.json it was compiled from",
    "examples/": "training programs: a plain loop, custom patterns, Trainer, Ray Train, a model that is not from "
    "transformers",
    "benchmarks/": "programs that measure: planning, loading, training, presplit, killed commands",
    "scripts/": "what draws and writes the generated parts of this documentation",
    "docs/": "this documentation",
    "tests/": "one folder for each folder above, named by the behaviour that a test holds",
}


def cli() -> str:
    """Every command with its arguments and options, as Markdown."""
    context = click.Context(command_line, info_name="autotp-plan")
    return "\n".join(_command(command_line, context, 2))


def _command(command: click.Command, context: click.Context, level: int) -> Iterator[str]:
    yield f"{'#' * level} `{context.command_path}`\n"
    if not isinstance(command, click.Group):
        pieces = " ".join(command.collect_usage_pieces(context))
        yield f"```text\n{context.command_path} {pieces}\n```\n"
    yield _help(command.help or "")
    rows = [
        (", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts)), *_option(parameter, context))
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option) and not parameter.is_eager
    ]
    if rows:
        yield "| option | value | default | what it does |\n|---|---|---|---|"
        yield "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _command(child, click.Context(child, info_name=name, parent=context), level + 1)


def _help(text: str) -> str:
    """Help as Markdown: a paragraph that click may not wrap (after a backspace) is code."""
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        verbatim = paragraph.startswith("\b\n")
        parts.append(f"```text\n{paragraph[2:]}\n```" if verbatim else paragraph)
    return "\n\n".join(parts) + "\n"


def _option(option: click.Option, context: click.Context) -> tuple[str, str, str]:
    if isinstance(option.type, click.Choice):
        value = " or ".join(f"`{choice}`" for choice in option.type.choices)
    else:
        value = "" if option.is_flag else f"`{option.make_metavar(context)}`"
    default = "required" if option.required else f"`{option.default}`" if option.show_default else ""
    return value, default, (option.help or "")


def fields(schema: str) -> str:
    """The objects of `schemas/<schema>.schema.json` and their keys, as Markdown."""
    data = json.loads((PACKAGE / "schemas" / f"{schema}.schema.json").read_text(encoding="utf-8"))
    parts = list(_object("the file", data))
    for name, definition in data.get("$defs", {}).items():
        if definition.get("type") == "object":
            parts += _object(name, definition)
        else:
            values = ", ".join(f"`{value}`" for value in definition.get("enum", ()))
            parts.append(f"### `{name}`\n\n{_cell(definition.get('description', ''))} {values}\n")
    return "\n".join(parts)


def _object(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name if name == 'the file' else f'`{name}`'}\n"
    if description := schema.get("description"):
        yield f"{_cell(description)}\n"
    required = schema.get("required", ())
    yield "| key | type | required | what it says |\n|---|---|---|---|"
    nested = []
    for key, value in schema.get("properties", {}).items():
        need = "yes" if key in required else ""
        yield f"| `{key}` | {_type(value)} | {need} | {_cell(value.get('description', ''))} |"
        inner = value.get("items", {}) if value.get("type") == "array" else value
        if "properties" in inner:
            nested.append((key, inner))
    yield ""
    for key, value in nested:
        yield from _object(key, value)


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema or "const" in schema:
        return "string" if isinstance((schema.get("enum") or [schema.get("const")])[0], str) else "value"
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"name: {_type(schema['additionalProperties'])}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def tree() -> str:
    """The packages, folder by folder: a line per file, the first sentence of its docstring. As Markdown."""
    parts = [section for room in ROOMS for section in _folder(PACKAGE / room)]
    return "\n".join([*parts, "### Other folders\n", *_table("folder", OTHER_FOLDERS.items())])


def _folder(folder: Path) -> Iterator[str]:
    yield f"### `{folder.relative_to(ROOT)}/`\n\n{summary(folder / '__init__.py')}.\n"
    files = {path.name: summary(path) for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"}
    for path in sorted(folder.glob("*.schema.json")):
        files[path.name] = _sentence(json.loads(path.read_text(encoding="utf-8"))["description"])
    if presets := [path for path in folder.glob("*.json") if path.name not in files]:
        files["*.json"] = f"{len(presets)} presets, one file per architecture"
    yield from _table("file", files.items())
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").exists():
            yield from _folder(path)


def _table(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f"| {title} | |\n|---|---|"
    yield from (f"| `{name}` | {_cell(line)} |" for name, line in rows)
    yield ""


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, without the full stop."""
    return _sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def _sentence(text: str) -> str:
    first = " ".join(text.strip().split("\n\n")[0].split())
    return first.split(". ")[0].rstrip(".")


def presets() -> str:
    """Every preset: its name, the `model_type`s it is for, what it covers."""
    rows = ["| preset | `model_type` | covers |", "|---|---|---|"]
    for name in preset_names():
        preset = read_preset(name)
        types = ", ".join(f"`{one}`" for one in preset.model_types)
        rows.append(f"| `{name}` | {types} | {_cell(preset.description)} |")
    return "\n".join(rows)


PARTS: dict[str, Callable[[], str]] = {
    "cli": cli,
    "plan": lambda: fields("plan"),
    "shards": lambda: fields("shards"),
    "tree": tree,
    "presets": presets,
}
"""What a line `<!-- generated: NAME -->` of a page stands for."""


if __name__ == "__main__":
    sys.stdout.write(PARTS[sys.argv[1]]() + "\n")
