"""The colours of ranks can be told apart by readers with any colour vision, and numbers on them can be read."""

from __future__ import annotations

import itertools
import math

import pytest

from autotp_plan.planner.pictures.colours import RANKS, apart, group_of, ink_on, num_groups, palette, ramp

Colour = tuple[float, float, float]
_SIGHT: dict[str, tuple[Colour, Colour, Colour]] = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}  # Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009


def linear(colour: str) -> Colour:
    values = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in values)
    return red, green, blue


def seen(colour: str, sight: str) -> Colour:
    """OKLab of a colour as it is seen."""
    light = linear(colour)
    red, green, blue = (min(1.0, max(0.0, sum(a * b for a, b in zip(row, light)))) for row in _SIGHT[sight])
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    middle = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def least_distance(colours: tuple[str, ...], sight: str) -> float:
    return min(math.dist(seen(a, sight), seen(b, sight)) for a, b in itertools.combinations(colours, 2))


@pytest.mark.parametrize("sight", list(_SIGHT))
def test_eight_ranks_are_told_apart(sight: str) -> None:
    assert least_distance(RANKS, sight) > 0.12, "0.02 is a difference that is just seen"


def test_colours_that_are_not_told_apart_are_found() -> None:
    assert least_distance(("#d62728", "#2ca02c"), "deuteranopia") < least_distance(("#d62728", "#2ca02c"), "normal") / 2
    assert least_distance(("#226972", "#296a73"), "normal") < 0.12


def luminance(colour: str) -> float:
    return sum(part * value for part, value in zip((0.2126, 0.7152, 0.0722), linear(colour)))


@pytest.mark.parametrize("colour", [*RANKS, *ramp(64)])
def test_the_number_of_a_rank_can_be_read(colour: str) -> None:
    light, dark = sorted((luminance(colour), luminance(ink_on(colour))), reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 3.4


def test_more_ranks_have_a_ramp_that_becomes_lighter() -> None:
    for count in (9, 16, 64):
        lightness = [seen(colour, "normal")[0] for colour in palette(count)]
        assert lightness == sorted(lightness) and len(set(palette(count))) == count
    assert num_groups(4096) == 64
    assert sorted({group_of(rank, 4096) for rank in range(4096)}) == list(range(64))


@pytest.mark.parametrize("count", range(2, 33))
def test_neighbours_in_a_stacked_bar_differ_for_any_colour_vision(count: int) -> None:
    colours = apart(count)
    assert sorted(colours) == sorted(ramp(count))
    pairs = [(a, b) for a, b in zip(colours, colours[1:])]
    assert min(math.dist(seen(a, sight), seen(b, sight)) for a, b in pairs for sight in _SIGHT) > 0.14
