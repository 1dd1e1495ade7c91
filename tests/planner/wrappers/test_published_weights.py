"""Checkpoints with the names they are published with: every rank gets the bytes that `from_pretrained` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autotp_plan.planner import compile_plan
from autotp_plan.planner.shards.merge import merge
from autotp_plan.planner.shards.presplit import presplit
from autotp_plan.runtime.loading.read_weights import read_weight
from autotp_plan.runtime.loading.weights import open_weights
from autotp_plan.schemas.errors import CheckpointError, MismatchError
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.wrappers import OTHERS, WRAPPERS, make_wrapper_config, save_wrapper
from tests.planner.fallback.test_tp_plan import right
from tests.planner.wrappers.test_wrapper import OLD_NAMES, PLAIN_TOWER, PUBLISHED, bare, renamed

pytestmark = pytest.mark.sweep

OLDER = {
    **PUBLISHED, "aya_vision": OLD_NAMES, "got_ocr2": PLAIN_TOWER, "vipllava": OLD_NAMES, "llava_next_video": OLD_NAMES,
}  # fmt: skip
EXPERTS = "model.language_model.layers.{}.mlp.experts.{}"


def expected(folder: Path, plan: Plan, tp_rank: int) -> dict[str, torch.Tensor]:
    """A rank's part of what `from_pretrained` loads."""
    from transformers import AutoModelForImageTextToText

    full = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    found = {}
    for entry in plan.expanded():
        layout, tensor = plan.layouts[entry.layout], full[entry.name]
        if layout.dim is not None:
            view = tensor.view(layout.shape)
            parts = [view.narrow(layout.dim, a, b - a) for a, b in layout.intervals[tp_rank]]
            tensor = torch.cat(parts, layout.dim)
        found[entry.name] = tensor
    return found


def assert_loads_as_transformers_does(folder: Path, work: Path, plan: Plan) -> None:
    """From the checkpoint and from its shards; and the shards give the checkpoint back."""
    presplit(plan, folder, work / "shards")
    for tp_rank in range(plan.tp_size):
        wanted = expected(folder, plan, tp_rank)
        for source in (folder, work / "shards"):
            for weight in open_weights(source, plan).of_rank(tp_rank):
                found = read_weight(weight, torch.device("cpu"), None)
                assert torch.equal(found.reshape(-1), wanted[weight.name].reshape(-1)), weight.name
    merge(work / "shards", work / "merged")
    before, after = (path / "model.safetensors" for path in (folder, work / "merged"))
    assert before.read_bytes() == after.read_bytes()


@pytest.mark.parametrize("variant", OLDER)
def test_published_names_give_the_bytes_of_from_pretrained(tmp_path: Path, variant: str) -> None:
    now = save_wrapper(tmp_path / "now", variant)
    folder = tmp_path / "published"
    if variant in WRAPPERS:
        renamed(now, folder, OLDER[variant])
    else:
        folder.mkdir()
        (folder / "config.json").write_text((now / "config.json").read_text())
        save_file(dict(in_old_names(load_file(now / "model.safetensors"), variant)), folder / "model.safetensors")
    plan = compile_plan(folder, tp_size=2, prove=right)
    assert_loads_as_transformers_does(folder, tmp_path, plan)


def in_old_names(tensors: dict[str, torch.Tensor], variant: str) -> Any:
    """The tensors as they were named before; `save_pretrained` may name them so already."""
    for name, tensor in tensors.items():
        new = next((new for new in OLDER[variant] if name.startswith(new)), "")
        yield (OLDER[variant][new] + name.removeprefix(new) if new else name), tensor


@pytest.mark.parametrize("variant", sorted(OTHERS))
def test_names_of_transformers_give_the_bytes_of_from_pretrained(tmp_path: Path, variant: str) -> None:
    folder = save_wrapper(tmp_path / "now", variant)
    assert_loads_as_transformers_does(folder, tmp_path, compile_plan(folder, tp_size=2, prove=right))


def published_experts(tmp_path: Path, **text: Any) -> tuple[Path, Path]:
    """Qwen3-VL-MoE as transformers saves it, and as it is published: its experts transposed."""
    config = {**WRAPPERS["qwen3_vl_moe"]["text_config"], **text}
    now = save_wrapper(tmp_path / "now", "qwen3_vl_moe", text_config=config)
    folder = bare(tmp_path / "published", {})
    (folder / "config.json").write_text((now / "config.json").read_text())
    tensors = load_file(now / "model.safetensors")
    turned = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors.items()}
    save_file(turned, folder / "model.safetensors")
    return now, folder


def transposed(plan: Plan) -> set[str]:
    return {entry.name for entry in plan.expanded() if entry.transposed}


def test_experts_that_are_transposed_on_disk(tmp_path: Path) -> None:
    now, folder = published_experts(tmp_path)
    plan, plain = (compile_plan(one, tp_size=2) for one in (folder, now))
    assert transposed(plan) == {EXPERTS.format(n, leaf) for n in (0, 1) for leaf in ("gate_up_proj", "down_proj")}
    assert not transposed(plain)
    assert plan.layouts == plain.layouts and plan.model == plain.model
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.read(tmp_path / "plan.json") == plan
    for one, of in ((plan, folder), (plain, now)):
        assert_loads_as_transformers_does(of, tmp_path / of.name / "work", one)
    # of the config alone, the plan is for what is published
    config = bare(tmp_path / "config", {})
    (config / "config.json").write_text((folder / "config.json").read_text())
    assert compile_plan(config, tp_size=2).parameters == plan.parameters
    with pytest.raises(MismatchError, match="a tensor is not what the plan says"):
        presplit(plan, now, tmp_path / "wrong")


def test_a_square_matrix_is_not_transposed(tmp_path: Path) -> None:
    """transformers goes by the shape, and so must we: of a square one nothing can be seen."""
    now, _ = published_experts(tmp_path, moe_intermediate_size=32)  # gate and up are 64 x 64
    plan = compile_plan(now, tp_size=2)
    assert not transposed(plan)
    _, folder = published_experts(tmp_path / "again", moe_intermediate_size=32)
    plan = compile_plan(folder, tp_size=2)
    assert transposed(plan) == {EXPERTS.format(n, "down_proj") for n in (0, 1)}
    assert_loads_as_transformers_does(folder, tmp_path, plan)


def test_another_shape_is_a_fault(tmp_path: Path) -> None:
    _, folder = published_experts(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = EXPERTS.format(1, "down_proj")
    save_file({**tensors, name: tensors[name].permute(2, 0, 1).contiguous()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        compile_plan(folder, tp_size=2)


def test_what_transformers_transposes_is_what_the_table_says() -> None:
    """The conversion of transformers, read as for a model without a table, names the same tensors and shapes."""
    from transformers import AutoModelForImageTextToText

    from autotp_plan.huggingface.disk_names import disk_names

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(make_wrapper_config("qwen3_vl_moe"))
    names = disk_names(model)
    experts = EXPERTS.format("*", "{}")
    assert names.transposed == {experts.format("gate_up_proj"): (-1, 48, 64), experts.format("down_proj"): (-1, 64, 24)}
    assert not names.odd and not any("experts" in name for name in (*names.renamed, *names.assembled))
