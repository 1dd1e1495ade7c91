"""What a rank of the training program waits for, said when another rank does not come."""

from __future__ import annotations

from types import TracebackType

from autotp_plan.schemas.errors import FailedRankError, Fault

_SIGNS = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe")
"""What torch says of a collective that ended because of another rank: of gloo and of NCCL."""


class Doing:
    """What this rank is doing; a collective that fails in the block ends in an error that names it.

    Args:
        timeout: the time limit of collectives in seconds; None for that of DeepSpeed.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout, self._now = timeout, "the first step"

    def __call__(self, now: str) -> None:
        """Say what comes now."""
        self._now = now

    def __enter__(self) -> Doing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS):
            limit = f" within {self._timeout:g} seconds" if self._timeout else ""
            raise FailedRankError(
                Fault(
                    code="rank-did-not-come",
                    what="another rank has ended, or did not come to a collective in time",
                    where=self._now,
                    got=str(error).splitlines()[0],
                    expected=f"every rank in the same collective{limit}",
                    next="look at the output and the host of the other ranks; where they are only slow, give a larger "
                    "--timeout",
                )
            ) from error
