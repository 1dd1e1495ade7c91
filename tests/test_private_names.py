"""Private names of other packages are said in one file for each: the files called `*internals.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

import pytest

from tests.helpers.paths import PACKAGE

PARTS = ("schemas", "huggingface", "factories", "planner", "runtime")
FILES = [path for part in PARTS for path in sorted((PACKAGE / part).rglob("*.py"))]
INTERNALS = [path for path in FILES if path.name.endswith("internals.py")]

LISTED = frozenset({
    "allreduce_and_copy", "build_shm_op", "checkpoint_event_epilogue", "checkpoint_event_prologue", "ds_autotp_parsed",
    "ds_id", "ds_numel", "ds_shape", "ds_tensor", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat",
    "get_hp_fragment_address", "get_param_id", "grad_position", "lp_fragment_address", "param_group_index",
    "single_partition_of_fp32_groups", "swap_optimizer", "update_lp_params", "DS_IS_REPLACED_MODULE",
    "DS_TENSOR_MODEL_PARALLEL", "GatherReplacedLayerParams", "TensorParallel_Layer", "UNIVERSAL_CHECKPOINT_INFO",
    "collect_autotp_universal_checkpoint_info", "init_utils", "PrefixChange", "WeightConverter", "rename_source_key",
    "get_model_conversion_mapping", "tensor_model_parallel", "ds_is_replaced_module",
})  # fmt: skip
"""Names without an underscore that their packages do not document."""

MODULES = (
    "accelerate.accelerator", "deepspeed.checkpoint.constants", "deepspeed.comm.torch", "deepspeed.module_inject",
    "deepspeed.runtime.tensor_parallel", "deepspeed.runtime.zero.stage", "transformers.conversion_mapping",
    "transformers.core_model_loading", "transformers.integrations.deepspeed", "unittest.mock",
)  # fmt: skip
"""Modules that no other file imports; and unittest.mock, which belongs to tests."""

DOCUMENTED = {"os._exit", "torch._foreach_mul_"}
"""What may be said: documented in spite of its underscore; and a faster way to multiply tensors, used in the proof."""

HOUSE = {"_T", "_F", "_chunk", "_rows"}
"""Our own names that are given as strings."""

TEXT_METHODS = {"endswith", "startswith", "removesuffix", "removeprefix", "split", "rpartition", "replace"}


def private_names(source: str, defined: Iterable[str]) -> Iterator[str]:
    """The private names of other packages that a file says, given the names that we define ourselves."""
    ours = set(defined) | HOUSE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            said = ast.unparse(node)
            if (node.attr in LISTED or is_private(node.attr)) and node.attr not in ours and said not in DOCUMENTED:
                yield said
        elif isinstance(node, ast.Constant) and node.value in LISTED:
            yield str(node.value)
        elif isinstance(node, ast.Call):  # getattr(it, "_name"), mock.patch.object(it, "_name")
            words = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            is_text = isinstance(node.func, ast.Attribute) and node.func.attr in TEXT_METHODS
            yield from (word for word in words if is_private(word) and word not in ours and not is_text)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_private_module(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(("autotp_plan", "__")):
            for alias in node.names:
                if is_private_module(f"{node.module}.{alias.name}") or alias.name in LISTED:
                    yield f"{node.module}.{alias.name}"


def is_private(name: str) -> bool:
    return name.startswith("_") and name.isidentifier() and not name.endswith("__") and name != "_"


def is_private_module(name: str) -> bool:
    return name.startswith(MODULES) or any(is_private(step) for step in name.split("."))


def defined_names(sources: Iterable[str]) -> set[str]:
    """Functions, classes, variables and attributes of `self` that the sources define."""
    found: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) in ("self", "made")  # `made`: of a class that cannot have an __init__
            ):
                found.add(node.attr)
    return found


OURS = defined_names(path.read_text(encoding="utf-8") for path in FILES if path not in INTERNALS)


def test_there_are_such_files() -> None:
    names = {str(path.relative_to(PACKAGE)) for path in INTERNALS}
    assert names == {
        "huggingface/internals.py", "runtime/deepspeed/internals.py", "runtime/deepspeed/zero_internals.py",
        "runtime/deepspeed/saving_internals.py", "runtime/deepspeed/store_internals.py",
        "runtime/tensor_parallel/torch_internals.py", "runtime/estimate/fake_internals.py",
        "schemas/untrusted/re_internals.py",
    }  # fmt: skip
    for path in INTERNALS:
        assert list(private_names(path.read_text(encoding="utf-8"), OURS)), f"{path} says no private name"


@pytest.mark.parametrize("name", [str(path.relative_to(PACKAGE)) for path in FILES if path not in INTERNALS])
def test_no_other_file_says_a_private_name(name: str) -> None:
    assert not list(private_names((PACKAGE / name).read_text(encoding="utf-8"), OURS))


@pytest.mark.parametrize(
    "planted",
    [
        "mapping = getattr(parameter, '_hp_mapping', None)",
        "groups._init_tp_mesh_device(2)",
        "model.ds_autotp_parsed = True",
        "setattr(model, 'ds_autotp_parsed', True)",
        "size = parameter.ds_tensor.numel()",
        "from torch.utils._pytree import tree_map",
        "import torch._C",
        "from deepspeed.checkpoint.constants import PARAM_SHAPES",
        "from deepspeed.module_inject.layers import LinearLayer",
        "from unittest.mock import patch",
        "module._parameters['weight'] = None",
        "patch.object(accelerator, '_prepare_deepspeed', it)",
    ],
)
def test_a_private_name_is_found(planted: str) -> None:
    assert list(private_names(planted, OURS))


def test_our_own_names_are_not() -> None:
    source = "class A:\n    _mine = 1\n    def f(self): return self._mine + self.other._mine\n"
    assert not list(private_names(source, defined_names([source])))
