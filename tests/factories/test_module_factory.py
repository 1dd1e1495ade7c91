"""The function that makes a model that is not from transformers: found, called, and refused in one message."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.factories.module_factory import ModuleFactory, parse_arguments
from autotp_plan.schemas.errors import OptionError

OWN = "tests.helpers.own_models"


def code_of(function: Any, *arguments: Any) -> str | None:
    with pytest.raises(OptionError) as refused:
        function(*arguments)
    (fault,) = refused.value.faults
    assert fault.got and fault.expected and fault.next
    return fault.code


def test_the_model_on_meta_and_small() -> None:
    factory = ModuleFactory(name=f"{OWN}:Nano", arguments={"n_embd": 128})
    assert factory.config() == {
        "vocab_size": 320, "block_size": 128, "n_layer": 3, "n_head": 4, "n_embd": 128, "dropout": 0.1,
    }  # fmt: skip
    whole, small = factory.on_meta(), factory.make({"n_embd": 32, "n_layer": 1})
    assert whole.wte.weight.is_meta and whole.wte.weight.shape == (320, 128) and len(whole.h) == 3
    assert not small.wte.weight.is_meta and small.wte.weight.shape == (320, 32) and len(small.h) == 1


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("tests.helpers.own_models", "no-module-name"),
        ("os.system('ls'):x", "no-module-name"),
        (":x", "no-module-name"),
        ("no.such.module:x", "module-not-imported"),
        (f"{OWN}:nothing", "no-such-function"),
        (f"{OWN}:NOT_A_FUNCTION", "no-such-function"),
        (f"{OWN}:raises", "factory-raised"),
        (f"{OWN}:leaves", "factory-raised"),
        (f"{OWN}:no_module", "factory-gives-no-module"),
    ],
)
def test_what_is_refused(name: str, code: str) -> None:
    assert code_of(ModuleFactory(name=name).on_meta) == code


@pytest.mark.parametrize("body", ["raise SystemExit(1)", "import not_installed_anywhere", "1 +", "raise ValueError"])
def test_a_module_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (tmp_path / "broken_module.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert code_of(ModuleFactory(name="broken_module:make").function) == "module-not-imported"


def test_a_module_in_the_current_folder_and_nothing_else_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "found_here.py").write_text("import torch\nmake = lambda: torch.nn.Linear(2, 2)\n")
    (tmp_path / "not_named.py").write_text("raise AssertionError\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert ModuleFactory(name="found_here:make").make().weight.shape == (2, 2)
    assert "not_named" not in sys.modules


def test_arguments(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text('{"width": 8}')
    assert parse_arguments('{"width": 8}', "--small") == {"width": 8}
    assert parse_arguments(str(tmp_path / "sizes.json"), "--small") == {"width": 8}
    (tmp_path / "list.json").write_text("[8]")
    for text in ("{width: 8}", str(tmp_path / "list.json"), str(tmp_path / "nowhere.json"), str(tmp_path), "width=8"):
        assert code_of(parse_arguments, text, "--small") == "no-module-arguments"
    unknown = ModuleFactory(name=f"{OWN}:Nano", arguments={"width": 8}, small=({"depth": 1},))
    with pytest.raises(OptionError, match="depth, width") as refused:
        unknown.config()
    assert refused.value.faults[0].code == "unknown-module-arguments"
