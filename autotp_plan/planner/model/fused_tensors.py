"""Parameters that are several tensors on disk, such as experts: their shapes, from the headers of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autotp_plan.planner.model.tensor_names import DiskTensor
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.plan.entries import Sources
from autotp_plan.schemas.storage.plan_fit import assembled_shape
from autotp_plan.schemas.storage.safetensors_header import TensorEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedParameter:
    """A parameter that is several tensors on disk: its full shape, its dtype in safetensors' words, the tensors."""

    shape: tuple[int, ...]
    dtype: str
    sources: Sources


def fused_parameters(tensors: Iterable[tuple[DiskTensor, TensorEntry]], book: FaultBook) -> dict[str, FusedParameter]:
    """The parameters that tensors on disk make up.

    Args:
        tensors: each with what it is, and its shape and dtype.
        book: gets tensors that are missing (numbers count from 0 without gaps, and equally far for all that are
            numbered together), and tensors that do not fit together.

    Returns:
        complete parameters by name.
    """
    found: dict[str, dict[tuple[int, int], TensorEntry]] = defaultdict(dict)
    known: dict[str, DiskTensor] = {}
    counts: dict[str, int] = defaultdict(lambda: 1)
    for role, tensor in tensors:
        found[role.parameter][role.number, role.position] = tensor
        known[role.parameter] = role
        counts[role.stack] = max(counts[role.stack], role.number + 1)
    fused = {}
    for name, members in found.items():
        role = known[name]
        assert role.sources is not None
        sources = dataclasses.replace(role.sources, count=counts[role.stack])
        if not _is_complete(members, sources, book):
            continue
        shapes = [members[0, position].shape for position in range(len(sources.names))]
        dtype = members[0, 0].dtype
        if not _is_uniform(members, shapes, dtype, book):
            continue
        shape = assembled_shape(shapes, sources.count, sources.stacked)
        if shape is None:
            book.add(
                "fused-tensors-do-not-fit",
                "tensors that make up one parameter do not fit together",
                name,
                got=", ".join(str(list(one)) for one in shapes),
                expected="shapes that differ in dimension 0 only",
                next="correct the spec's assembled_tensors",
            )
            continue
        fused[name] = FusedParameter(shape=shape, dtype=dtype, sources=sources)
    return fused


def _is_uniform(
    members: Mapping[tuple[int, int], TensorEntry], shapes: Sequence[tuple[int, ...]], dtype: str, book: FaultBook
) -> bool:
    """Whether all tensors have the dtype and shape of the first with their name; one that has not is noted."""
    for (_, position), tensor in sorted(members.items()):
        if (tensor.shape, tensor.dtype) != (shapes[position], dtype):
            book.add(
                "fused-tensors-differ",
                "tensors that make up one parameter differ",
                tensor.name,
                got=f"{tensor.dtype} of {list(tensor.shape)}",
                expected=f"{dtype} of {list(shapes[position])}, as the first",
                next="fetch or save the checkpoint again",
            )
            return False
    return True


def _is_complete(members: Mapping[tuple[int, int], TensorEntry], sources: Sources, book: FaultBook) -> bool:
    """Whether every tensor is there; the first that is not is noted for each of the parameter's sources."""
    complete = True
    for position, source in enumerate(sources.names):
        numbers = {number for number, at in members if at == position}
        if len(numbers) == sources.count:
            continue
        complete = False
        first = next(number for number in range(len(numbers) + 1) if number not in numbers)
        book.add(
            "fused-tensor-missing",
            "the checkpoint lacks a tensor of a parameter that is several on disk",
            source.replace("*", str(first)),
            got=f"{len(numbers)} of {sources.count} tensors",
            expected="numbers from 0 without a gap, and as many of each kind",
            next="fetch the checkpoint again, or correct the spec's assembled_tensors",
        )
    return complete
