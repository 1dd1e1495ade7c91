"""Numbers and lists in words, as the page and the layer's picture say them."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_RANGES = 4


def ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges `(first, last)`."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] + 1 == number:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def numbers(of: Sequence[int], most: int = _MOST_RANGES) -> str:
    """`0 to 31`, `0, 2, 4, 6 and 20 more`: of more than `most` ranges, the first."""
    found = ranges(of)
    said = [f"{first} to {last}" if first < last else str(first) for first, last in found[:most]]
    rest = sum(last - first + 1 for first, last in found[most:])
    return ", ".join(said) + (f" and {rest} more" if rest else "")


def shape(sizes: Sequence[int]) -> str:
    """`4096 \u00d7 14336`, `scalar`."""
    return " \u00d7 ".join(map(str, sizes)) or "scalar"
