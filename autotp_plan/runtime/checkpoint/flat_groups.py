"""Whether the elements that were found in ZeRO's flat groups are all that the groups hold, and all of each parameter.

Where they lie is read from attributes that DeepSpeed does not promise to keep. If one of them moved, parameters could
be passed over, and a job would resume on the weights it started with. So nothing is loaded unless everything fits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed
from torch import Tensor

from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.deepspeed.zero_internals import FlatRange
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.upstream import version


def check_flat_groups(
    groups: Sequence[Tensor], ranges: Mapping[str, Sequence[FlatRange]], sizes: Mapping[str, int], ranks: Ranks
) -> None:
    """Check that `ranges` fill this rank's flat groups, and those of all DP ranks every parameter; all ranks call it.

    Args:
        groups: this rank's flat groups.
        ranges: what they hold of each trainable parameter.
        sizes: the number of elements that this TP rank holds of each of them, by the plan.
        ranks: this process's place in the mesh.

    Raises:
        MismatchError: on every rank, when an element is held twice, by no DP rank, or by no parameter.
    """
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    mine = (ranks.tp_rank, dict(sizes), dict(ranges), _group_faults(groups, ranges))
    torch.distributed.all_gather_object(gathered, mine)
    problems = [problem for *_, found in gathered for problem in found]
    for tp_rank in range(ranks.tp_size):
        of_rank = [one for one in gathered if one[0] == tp_rank]
        for name, size in of_rank[0][1].items():
            held = [found for _, _, by_name, _ in of_rank for found in by_name.get(name, ())]
            problems += [(name, f"TP rank {tp_rank}: {text}") for text in tiling_faults(held, size)]
    if problems:
        raise MismatchError(
            Fault(
                what=f"the optimizer of DeepSpeed {version('deepspeed')} does not hold its weights where they were "
                "looked for, and nothing was loaded",
                where=where,
                got=got,
                expected="every element of every trainable parameter once in ZeRO's flat groups, and padding",
                next="resume on the mesh and ZeRO stage the job was saved on, or with a version of DeepSpeed that "
                "autotp-plan was tried with: pip install 'autotp-plan[train]'",
            )
            for where, got in problems
        )


def tiling_faults(held: Iterable[FlatRange], size: int) -> list[str]:
    """What is wrong with `held` as all elements of a flattened parameter of `size`; empty when each is there once."""
    found = []
    reached = 0
    for start, numel in sorted((one.start, one.numel) for one in held if one.numel):
        if start != reached:
            found.append(f"elements {min(start, reached)} to {max(start, reached)} are held {_times(start, reached)}")
        reached = max(reached, start + numel)
    if reached != size:
        found.append(f"{reached} of {size} elements are held")
    return found


def _times(start: int, reached: int) -> str:
    return "by no DP rank" if start > reached else "twice"


def _group_faults(groups: Sequence[Tensor], ranges: Mapping[str, Sequence[FlatRange]]) -> list[tuple[str, str]]:
    """Elements of this rank's flat groups that two parameters hold, or none and that are no padding (zeros)."""
    found: list[tuple[str, str]] = []
    by_group: dict[int, list[iv.Interval]] = defaultdict(list)
    for name, held in ranges.items():
        for one in held:
            if not 0 <= one.group < len(groups):
                found.append((name, f"flat group {one.group} of {len(groups)}"))
            elif one.numel + one.padding:
                by_group[one.group].append((one.at, one.at + one.numel + one.padding))
    for number, flat in enumerate(groups):
        reached = 0
        for start, stop in [*sorted(by_group[number]), (flat.numel(), flat.numel())]:
            if start < reached or stop > flat.numel():
                found.append((f"flat group {number}", f"elements {start} to {stop} are of two parameters, or outside"))
            elif flat[reached:start].any():
                found.append((f"flat group {number}", f"elements {reached} to {start} are of no parameter"))
            reached = max(reached, stop)
    return found
