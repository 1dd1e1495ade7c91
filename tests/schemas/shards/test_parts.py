"""Parts of a shards folder: which files each has, and what their hidden files say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotp_plan.schemas.errors import OptionError
from autotp_plan.schemas.shards.output_file import temporary_path
from autotp_plan.schemas.shards.parts import Part, balanced, find_parts, listed, part_of, remove_part_files

SIZES = st.lists(st.integers(0, 50), max_size=12)


def best(sizes: list[int], count: int) -> int:
    """The least that the largest of `count` runs of neighbours can be."""
    if count == 1:
        return sum(sizes)
    return min(max(sum(sizes[:first]), best(sizes[first:], count - 1)) for first in range(len(sizes) + 1))


@given(sizes=SIZES, count=st.integers(1, 4))
def test_parts_are_neighbours_and_the_largest_is_as_small_as_can_be(sizes: list[int], count: int) -> None:
    parts = balanced(sizes, count)
    assert parts == sorted(parts) and len(parts) == len(sizes) and set(parts) <= set(range(count))
    bytes_of = [sum(size for size, of in zip(sizes, parts) if of == part) for part in range(count)]
    assert max(bytes_of) == best(sizes, count)
    assert len(set(parts)) == min(count, len(sizes)), "no part is empty while another has two files"


@given(
    number=st.integers(1, 9000), more=st.integers(0, 1000), name=st.sampled_from(["a.json", ".autotp-complete.1-of-2"])
)
def test_names_say_which_part(number: int, more: int, name: str) -> None:
    part = Part(number, number + more)
    for made in (part.journal_name, part.record_name, part.temporary_name(name, "0123abcd")):
        assert part_of(made) == part and made.startswith(".")
    assert Part.parse(f"{number}/{number + more}") == part


@pytest.mark.parametrize(
    "name", ["tp-00-of-02.00001-of-00003.safetensors", ".autotp-unfinished", ".hidden.3-of-8", "autotp-complete.3-of-8"]
)
def test_other_files_are_of_no_part(name: str) -> None:
    assert part_of(name) is None
    assert part_of(temporary_path(Path(name)).name) is None


@pytest.mark.parametrize("text", ["", "3", "3/", "0/8", "9/8", "-1/8", "3/8/9", "a/b", "1/10001", "1/1000000", "3 / 8"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="there is no such part"):
        Part.parse(text)


def test_how_far_a_folder_is(tmp_path: Path) -> None:
    assert find_parts(tmp_path / "none") is None and find_parts(tmp_path) is None
    for number in (1, 2, 5):
        (tmp_path / Part(number, 8).record_name).touch()
    for number in (2, 4):
        (tmp_path / Part(number, 8).journal_name).touch()
    (tmp_path / "config.json").touch()
    found = find_parts(tmp_path)
    assert found is not None and found.missing == [3, 4, 6, 7, 8]
    assert str(found) == "3 of 8 parts are complete, 4 is begun, 3, 6, 7 and 8 are not begun"
    remove_part_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_long_list_is_cut() -> None:
    assert [listed(numbers, 3) for numbers in ([], [1], [1, 2], [1, 2, 3, 4, 5])] == [
        "",
        "1",
        "1 and 2",
        "1, 2, 3 and 2 more",
    ]
