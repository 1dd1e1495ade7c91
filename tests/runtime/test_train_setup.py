"""What the training program makes of its options: no code of a shards folder is run for the tokenizer."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from autotp_plan.runtime.train_setup import dataset
from autotp_plan.schemas.errors import MismatchError
from tests.helpers.paths import EXAMPLES, PACKAGE

EVIL = """
from pathlib import Path
from transformers import PreTrainedTokenizer
Path({ran!r}).touch()
class Evil(PreTrainedTokenizer):
    pass
"""


CODE = {"auto_map": {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}}


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "code"),
    [
        ({"model_type": "llama"}, CODE, "tokenizer-of-code"),
        ({"model_type": "evil", **CODE}, {}, None),
        ({"model_type": "llama", **CODE}, {}, None),
    ],
)
def test_code_of_a_tokenizer_is_not_run_whatever_is_on_stdin(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    tokenizer_config: dict[str, Any],
    code: str | None,
) -> None:
    folder, ran = tmp_path / "shards", tmp_path / "ran"
    folder.mkdir()
    (folder / "evil.py").write_text(EVIL.format(ran=str(ran)))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (tmp_path / "text").write_text("some text")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    with pytest.raises(MismatchError) as caught:
        dataset(tmp_path / "text", str(folder), nn.Linear(1, 1), 2, 10, 0)
    assert code is None or caught.value.faults[0].code == code
    assert not ran.exists()


def automatic_calls(source: str) -> list[ast.Call]:
    """The calls that make something of a class of transformers which may be code of the folder."""
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and (
            ast.unparse(node.func.value).rpartition(".")[2].startswith("Auto") or "automatic" in ast.unparse(node.func)
        )
    ]


def test_every_automatic_class_is_told_not_to_run_code() -> None:
    found = {
        path: call
        for folder in (PACKAGE, EXAMPLES)
        for path in folder.rglob("*.py")
        for call in automatic_calls(path.read_text())
    }
    assert len(found) >= 6
    for path, call in found.items():
        allowed = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("trust_remote_code")
        made_here = path.name == "tiny.py"  # of a config that is made on the spot
        assert allowed == "False" or made_here, f"{path}: {ast.unparse(call)}"
