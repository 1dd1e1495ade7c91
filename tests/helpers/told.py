"""What ranks were told of an error, compared with what they should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def check_told(told: Sequence[Mapping[str, str]], expected: Mapping[str, Sequence[str]]) -> None:
    """All ranks got the same errors; each begins with the first of its expected parts, and has the others."""
    first = told[0]
    assert all(other == first for other in told)
    assert first.keys() == expected.keys()
    for name, parts in expected.items():
        assert first[name].startswith(parts[0]), f"{name}: {first[name]}"
        for part in parts[1:]:
            assert part in first[name], f"{name}: {first[name]}"
