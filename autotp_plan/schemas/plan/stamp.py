"""The stamp of a plan that `verify` has proved: which plan, with which versions, and how exact it came out.

The plan's fingerprint does not cover it, so shards that were written before stay valid.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """What was verified. `plan` is the fingerprint of the plan that was.

    `float64_error` is the largest difference of any number from the dense model's (relative to the largest magnitude in
    its tensor where that is above 1), `engine_error` the largest relative one of the DeepSpeed engine's in float32.
    `twin` is a hash of what was run: sizes, tokens, attentions. `seal` is a hash of all of this and the plan with its
    rules, so that a stamp that was changed, or is from another plan, is noticed. It is a record and no signature: who
    wants to deceive can compute it too. Stamps of version 0.1 have neither.
    """

    plan: str
    versions: dict[str, str]
    attention: tuple[str, ...]
    float64_error: float
    engine_error: float
    twin: str | None = None
    seal: str | None = None

    def __str__(self) -> str:
        """`eager and sdpa attention, errors up to 2e-15 (float64) and 3e-07 (engine, float32); torch 2.13.0, ...`."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        errors = f"{self.float64_error:.1e} (float64) and {self.engine_error:.1e} (engine, float32)"
        return f"{' and '.join(self.attention)} attention, errors up to {errors}; {versions}"
