"""Putting together, from the headers of a checkpoint, the parameters that are several tensors on disk."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autotp_plan.planner.model.tensor_names import Part
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.plan.document import Sources
from autotp_plan.schemas.storage.plan_fit import assembled_shape
from autotp_plan.schemas.storage.safetensors_header import TensorEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembled:
    """A parameter that is several tensors on disk."""

    shape: tuple[int, ...]
    dtype: str
    sources: Sources


def assemble(parts: Iterable[tuple[Part, TensorEntry]], book: FaultBook) -> dict[str, Assembled]:
    """The parameters that `parts` make up, by name.

    Noted in `book`: tensors that are missing (numbers count from 0 without gaps, and as far for all that are numbered
    together), tensors that are unlike.
    """
    found: dict[str, dict[tuple[int, int], TensorEntry]] = defaultdict(dict)
    known: dict[str, Part] = {}
    counts: dict[str, int] = defaultdict(lambda: 1)
    for part, tensor in parts:
        found[part.parameter][part.number, part.position] = tensor
        known[part.parameter] = part
        counts[part.stack] = max(counts[part.stack], part.number + 1)
    assembled = {}
    for name, tensors in found.items():
        part = known[name]
        assert part.sources is not None
        sources = dataclasses.replace(part.sources, count=counts[part.stack])
        if not _is_complete(tensors, sources, book):
            continue
        rows = [tensors[0, position].shape for position in range(len(sources.names))]
        dtype = tensors[0, 0].dtype
        for (_, position), tensor in sorted(tensors.items()):
            if (tensor.shape, tensor.dtype) != (rows[position], dtype):
                book.add(
                    "tensors that make up one parameter are unlike",
                    tensor.name,
                    got=f"{tensor.dtype} of {list(tensor.shape)}",
                    expected=f"{dtype} of {list(rows[position])}, as the first",
                    next="fetch or save the checkpoint again",
                )
                break
        else:
            shape = assembled_shape(rows, sources.count, sources.stacked)
            if shape is not None:
                assembled[name] = Assembled(shape=shape, dtype=dtype, sources=sources)
                continue
            book.add(
                "tensors that make up one parameter do not fit together",
                name,
                got=", ".join(str(list(row)) for row in rows),
                expected="shapes that differ in dimension 0 only",
                next="correct the spec's assembled_tensors",
            )
    return assembled


def _is_complete(tensors: Mapping[tuple[int, int], TensorEntry], sources: Sources, book: FaultBook) -> bool:
    """Whether every tensor is there; the first that is not is noted for each of the parameter's sources."""
    complete = True
    for position, source in enumerate(sources.names):
        numbers = {number for number, at in tensors if at == position}
        if len(numbers) == sources.count:
            continue
        complete = False
        first = next(number for number in range(len(numbers) + 1) if number not in numbers)
        book.add(
            "the checkpoint lacks a tensor of a parameter that is several on disk",
            source.replace("*", str(first)),
            got=f"{len(numbers)} of {sources.count} tensors",
            expected="numbers from 0 without a gap, and as many of each kind",
            next="fetch the checkpoint again, or correct the spec's assembled_tensors",
        )
    return complete
