"""What the documentation says of commands, names and numbers is what the code has."""

from __future__ import annotations

import json
import re
import shlex

import click
import pytest

from autotp_plan import planner, runtime
from autotp_plan.planner.cli.main import main as command_line
from autotp_plan.planner.rules.preset_files import preset_names
from scripts.reference import ROOMS, cli, fields, tree
from tests.docs.test_links import documents
from tests.helpers.paths import PLANS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAIN = "-m autotp_plan.runtime.train "


def commands() -> list[str]:
    """Every command line of ours in the documentation, as one would type it."""
    found = set()
    for path in documents():
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?: {4}|\$ )(.*)$", text, re.MULTILINE):
            line = re.sub(r" +#.*$", "", line).removesuffix("...").strip()
            if re.match(r"autotp-plan [a-z]", line) or (TRAIN in line and line.startswith("torchrun")):
                found.add(line)
    return sorted(found)


def parse(line: str) -> None:
    """Raises click.UsageError when a command of ours would not take this line."""
    command: click.Command = command_line
    if TRAIN in line:
        from autotp_plan.runtime.train import main as training

        command, words = training, shlex.split(line.split(TRAIN, 1)[1])
    else:
        words = shlex.split(line)[1:]
    name = "autotp-plan"
    while isinstance(command, click.Group):
        name, *words = words
        if name not in command.commands:
            raise click.UsageError(f"no such command: {name}")
        command = command.commands[name]
    command.make_context(name, words)


@pytest.mark.parametrize("line", commands())
def test_commands_in_the_documentation_are_understood(line: str) -> None:
    parse(line)


def test_a_command_that_is_not_understood_is_found() -> None:
    for line in ("autotp-plan compile --model m --tpsize 2 -o p", "autotp-plan split p", "autotp-plan presplit p -o s"):
        with pytest.raises(click.UsageError):
            parse(line)


def test_the_command_line_reference_has_every_command_and_option() -> None:
    page = cli()
    for name, command in command_line.commands.items():
        assert f"`autotp-plan {name}`" in page
        for parameter in command.params:
            assert all(f"`{option}`" in page for option in parameter.opts if option.startswith("-"))


@pytest.mark.parametrize("schema", ["plan", "shards"])
def test_the_tables_of_fields_have_every_key(schema: str) -> None:
    def keys(value: object) -> set[str]:
        if isinstance(value, list):
            return {key for item in value for key in keys(item)}
        if not isinstance(value, dict):
            return set()
        return set(value.get("properties", ())) | {key for item in value.values() for key in keys(item)}

    wanted = keys(json.loads((ROOT / "autotp_plan" / "schemas" / f"{schema}.schema.json").read_text()))
    assert wanted
    page = fields(schema)
    assert not [key for key in wanted if f"| `{key}` |" not in page]


def test_the_tree_has_every_file_with_a_line() -> None:
    rows = dict(re.findall(r"^\| `(.+?)` \| (.*) \|$", tree(), re.MULTILINE))
    files = {path.name for room in ROOMS for path in (ROOT / room).rglob("*.py")} - {"__init__.py"}
    assert not files - set(rows)
    assert not [name for name, line in rows.items() if len(line) < 10], "a file without a docstring"


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = set(re.findall(r"^::: (autotp_plan\.(?:planner|runtime)\.\w+)$", page, re.MULTILINE))
    assert found == {f"{module.__name__}.{name}" for module in (planner, runtime) for name in module.__all__}


def test_the_readme_is_short_and_its_numbers_are_right() -> None:
    assert len(README.splitlines()) <= 150
    assert f"one of {len(preset_names())} [presets]" in README
    assert f"plans of {len(json.loads((PLANS / 'models.json').read_text()))} public models" in README
    families = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    counts = re.search(r"^(\d+) families: (\d+) right, \d+ refused\.$", families, re.MULTILINE)
    assert counts
    assert f"transformers' {counts[1]} causal families {counts[2]} are" in README
