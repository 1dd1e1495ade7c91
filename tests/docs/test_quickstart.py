"""The output in `docs/quickstart.md` is what the commands print today: those that start no ranks are run here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from autotp_plan.planner.cli.main import main
from scripts.quickstart import BLOCK, PAGE
from tests.helpers.checkpoints import llama_shapes, write_checkpoint
from tests.helpers.paths import EXAMPLES

OUTPUTS = {found[2]: found[3] for found in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))}
AGAIN = "run `python -m scripts.quickstart`"


def constant(name: str) -> object:
    """A constant of `examples/tiny.py`, which imports torch."""
    tree = ast.parse((EXAMPLES / "tiny.py").read_text(encoding="utf-8"))
    (value,) = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    return ast.literal_eval(value)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkpoint that `examples/tiny.py` makes: the same names, shapes and dtypes."""
    common, models = constant("COMMON"), constant("MODELS")
    assert isinstance(common, dict) and isinstance(models, dict)
    config = {**common, **models["tiny-llama"], "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    write_checkpoint(tmp_path / "example-run" / "tiny-llama", llama_shapes(config), config, dtype="F32")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_page_has_output() -> None:
    assert len(OUTPUTS) == 7
    assert all(OUTPUTS.values()), AGAIN


@pytest.mark.usefixtures("clone")
def test_the_output_of_the_planner_is_todays() -> None:
    printed = {}
    for commands in list(OUTPUTS)[:2]:  # compile and show, check
        lines = []
        for command in commands.split(" && "):
            if command.startswith("autotp-plan "):
                done = CliRunner().invoke(main, command.split()[1:])
                assert done.exit_code == 0, done.output
                lines += [line.rstrip() for line in done.stdout.splitlines()]
        printed[commands] = lines
    for commands, lines in printed.items():
        assert lines == OUTPUTS[commands].splitlines(), AGAIN


def test_the_demo_on_the_page_went_well() -> None:
    text = list(OUTPUTS.values())[-1]
    found = re.search(r"largest relative difference over all 100 steps: (\S+)", text)
    assert found and float(found[1]) < 1e-4
