"""The class of a sharded model: the model's own, by name, module and descent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch


def classes(plan_file: Path, folder: Path) -> tuple[list[str], bool, bool]:
    from transformers import LlamaForCausalLM

    from autotp_plan.runtime import load_plan

    first, second = (load_plan(plan_file).load_model(folder) for _ in range(2))
    names = [type(first).__name__, type(first).__module__]
    return names, isinstance(first, LlamaForCausalLM), type(first) is type(second)


@pytest.mark.distributed
@pytest.mark.timeout(270)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_sharded_model_is_still_of_its_class(tmp_path: Path, tp_size: int) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(tmp_path / "model", "llama")
    plan = compile_plan(folder, tp_size=tp_size)
    (tmp_path / "plan.json").write_text(plan.to_json())
    expected: Any = (["LlamaForCausalLM", "transformers.models.llama.modeling_llama"], True, True)
    assert launch(classes, tp_size, tmp_path / "plan.json", folder) == [expected] * tp_size
