"""What a string that names a model means."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotp_plan.schemas.errors import OptionError
from autotp_plan.sources.places.location import HubLocation, RemoteLocation, parse_location


@pytest.mark.parametrize(
    ("given", "repository", "revision", "folder"),
    [
        ("org/name", "org/name", "main", ""),
        ("org/name.v1-2_b@v1.0", "org/name.v1-2_b", "v1.0", ""),
        ("org/name@refs/pr/7", "org/name", "refs/pr/7", ""),
        ("org/name@feature/x", "org/name", "feature/x", ""),
        ("hf://org/name", "org/name", "main", ""),
        ("hf://org/name/", "org/name", "main", ""),
        ("hf://org/name@0123abc", "org/name", "0123abc", ""),
        ("hf://org/name/sub/folder", "org/name", "main", "sub/folder"),
        ("hf://org/name@v2/sub/folder/", "org/name", "v2", "sub/folder"),
        ("hf://org/name@refs/pr/7/sub", "org/name", "refs/pr/7", "sub"),
        ("hf://org/name@feature%2Fx/sub", "org/name", "feature/x", "sub"),
        ("https://huggingface.co/org/name", "org/name", "main", ""),
        ("https://huggingface.co/org/name/tree/v2/sub", "org/name", "v2", "sub"),
    ],
)
def test_places_on_the_hub(given: str, repository: str, revision: str, folder: str) -> None:
    expected = HubLocation(given=given, repository=repository, revision=revision, folder=folder)
    assert parse_location(given) == expected


@pytest.mark.parametrize(
    "given",
    ["./org/name", "../name", "/org/name", "~/name", "name", "a/b/c", "a/.hidden", "org/name@", "checkpoints/", ""],
)
def test_paths_that_are_not_there_stay_paths(given: str) -> None:
    assert parse_location(given) == Path(given)


@pytest.mark.parametrize(
    "given", ["s3://bucket/a/folder", "gs://bucket", "https://host/folder", "zip://x::s3://b/f.zip"]
)
def test_urls(given: str) -> None:
    assert parse_location(given) == RemoteLocation(url=given)
    assert parse_location(given + "/") == RemoteLocation(url=given)


def test_a_folder_that_is_there_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_location("org/name") == Path("org/name")
    assert parse_location(Path("org/other")) == Path("org/other"), "a Path is a path"
    assert parse_location(f"file://{tmp_path}") == tmp_path


@pytest.mark.parametrize(
    "given", ["hf://name", "hf://", "hf://datasets/org/name", "hf://org/name@", "hf://org/name/../x", "hf://org/na me"]
)
def test_what_cannot_be_on_the_hub_is_refused(given: str) -> None:
    with pytest.raises(OptionError) as refused:
        parse_location(given)
    assert refused.value.faults[0].code == "hub-location"
