"""The colours of ranks: eight that readers with any colour vision can tell apart, a ramp for more.

The eight were searched for the largest least distance in OKLab over normal vision and three simulated deficiencies
(Machado, Oliveira and Fernandes 2009); `tests/planner/pictures/test_colours.py` holds that distance.
"""

from __future__ import annotations

RANKS = ("#226972", "#fdbe45", "#896ace", "#d67620", "#66e6ba", "#9f3501", "#b4adf4", "#38a699")
MOST_GROUPS = 64
"""Above this many ranks, neighbours share a colour."""
_RAMP = ((76, 62, 160), (54, 112, 168), (47, 160, 140), (139, 195, 79), (242, 214, 72))


def num_groups(num_ranks: int) -> int:
    """How many colours `num_ranks` ranks are drawn in."""
    return min(num_ranks, MOST_GROUPS)


def group_of(rank: int, num_ranks: int) -> int:
    """The colour, counted from 0, of a rank: its number, or that of its group of neighbours."""
    return rank * num_groups(num_ranks) // num_ranks


def palette(count: int) -> tuple[str, ...]:
    """`count` colours as `#rrggbb`: those of up to 8 ranks, or a ramp from dark to light."""
    return RANKS[:count] if count <= len(RANKS) else ramp(count)


def ramp(count: int) -> tuple[str, ...]:
    """`count` colours from dark blue to light yellow, evenly spaced."""
    found = []
    for number in range(count):
        place = number * (len(_RAMP) - 1) / max(1, count - 1)
        low = min(int(place), len(_RAMP) - 2)
        part = place - low
        mixed = (round(a + (b - a) * part) for a, b in zip(_RAMP[low], _RAMP[low + 1]))
        found.append("#" + "".join(f"{value:02x}" for value in mixed))
    return tuple(found)


def apart(count: int) -> tuple[str, ...]:
    """The same colours in an order in which neighbours differ: dark and light by turns."""
    colours, half = ramp(count), (count + 1) // 2
    return tuple(colours[at // 2 + (half if at % 2 else 0)] for at in range(count))


def ink_on(colour: str) -> str:
    """Black or white, whichever has more contrast to `colour` by WCAG's relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))
    return "#10151a" if (luminance + 0.05) ** 2 > 1.05 * 0.057 else "#ffffff"


def rules(count: int) -> str:
    """CSS: `.r0` fills with the colour of rank 0, `.t0` with a colour for text on it."""
    colours = palette(count)
    return "".join(f".r{at}{{fill:{one}}}.t{at}{{fill:{ink_on(one)}}}" for at, one in enumerate(colours))
