"""A sum over the ranks that is deferred to its first use: what a vocabulary-parallel embedding looked up.

The first layer of a sharded stream takes this rank's tokens of it, by a reduce-scatter. Whatever else uses it gets the
whole sum, by an all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autotp_plan.runtime.tensor_parallel.collectives import sum_over_ranks
from autotp_plan.runtime.tensor_parallel.lazy_logits import ABOUT, SHAPE
from autotp_plan.runtime.tensor_parallel.torch_internals import map_tensors, without_torch_function


class LazilySummed(Tensor):
    """A rank's part of a sum over the ranks; it looks and behaves like the sum.

    The first use that needs the sum makes it: every rank of the group must make the same use. From then on it is the
    sum, so views of it and changes in place are those of an ordinary tensor.
    """

    group: Any
    _total: Tensor | None

    @classmethod
    def of(cls, part: Tensor, group: Any) -> Tensor:
        """The sum of which `part` is this rank's; made at once where `part` is of a subclass of Tensor itself."""
        if type(part) is not Tensor:  # a tensor without data, in an estimate
            return sum_over_ranks(part, group)
        made = part.as_subclass(cls)
        made.group, made._total = group, None
        return made

    @property
    def part(self) -> Tensor | None:
        """This rank's part as an ordinary tensor, None once the sum is made."""
        if self._total is not None:
            return None
        with without_torch_function():
            return self.as_subclass(Tensor)

    def summed(self) -> Tensor:
        """The sum; the first call is a collective."""
        part = self.part
        if part is not None:
            with torch.enable_grad():  # whoever asks first may not need a gradient, and others may
                self._total = sum_over_ranks(part, self.group)
        assert self._total is not None
        return self._total

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]  # one rank alone may show it to a person
        if self._total is not None:
            return repr(self._total)
        return f"{type(self).__name__}(shape={list(self.shape)}, of which this rank has a part of the sum)"

    def __format__(self, spec: str) -> str:
        return repr(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in SHAPE | ABOUT and isinstance(first, cls) and first._total is None:
            with without_torch_function():
                return func(*args, **kwargs)
        args, kwargs = map_tensors(cls, cls.summed, (args, kwargs))
        return func(*args, **kwargs)
