"""Paths and URLs: one spelling for a place, so that what is under what can be told without looking."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from qsharp_core.locations import LocationField, RemoteFolder, is_url, parse_location, split_locations

NAMES = st.from_regex(r"[A-Za-z0-9._@=+~-]{1,12}", fullmatch=True).filter(lambda name: name not in (".", ".."))


def folder(url: str) -> RemoteFolder:
    return RemoteFolder.of(url)


@given(st.lists(NAMES, max_size=6), st.lists(NAMES, min_size=1, max_size=3))
def test_it_is_made_of_names(parts: list[str], more: list[str]) -> None:
    one = folder(f"s3://{'/'.join(parts)}")
    assert folder(str(one)) == one
    inside = one
    for name in more:
        inside = inside / name
    assert (inside.name, inside.parts) == (more[-1], (*parts, *more))
    assert inside == one / "/".join(more) == one / Path(*more)
    assert inside.is_relative_to(one)
    assert not one.is_relative_to(inside)
    assert inside.parent.is_relative_to(one)


def test_spellings_of_the_same() -> None:
    assert folder("s3://bucket/critics/") == folder("S3://bucket/critics")
    assert str(folder("s3://bucket/critics/")) == "s3://bucket/critics"
    assert str(folder("s3://")) == "s3://"


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket//critics", "s3://bucket/../other", "s3://bucket/./x", "s3:///x", "s3://bucket/a b", "s3://bucket/%2e",
        "s3://bucket/x?versionId=1", "s3://bucket/x#y", "s3://bucket/a\\b", "s3://bucket/*", "s3://bucket/[a]",
        "s3://bucket/\n", "s3://bucket/\0", "s3://bucket/é", "s3://bucket/x//", "simplecache::s3://bucket/x",
        "s3://user:secret@bucket/x", "bucket/x", "s3:/bucket/x", "://x", "",
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|two slashes"):
        folder(url)


@pytest.mark.parametrize(
    "other",
    ["s3://bucket/critics-evil", "s3://bucket", "s3://bucket/critic", "s3://bucket-2/critics/x", "gs://bucket/critics/x",
     "s3://bucket/Critics/x", "s3a://bucket/critics/x"],
)  # fmt: skip
def test_a_sibling_is_not_inside(other: str) -> None:
    assert not folder(other).is_relative_to(folder("s3://bucket/critics"))


def test_a_folder_of_this_machine_is_a_path() -> None:
    assert parse_location("critics/sums/3") == Path("critics/sums/3")
    assert parse_location("file:///srv/critics") == parse_location("local:///srv/critics") == Path("/srv/critics")
    assert parse_location("hf://org/repo/sums") == RemoteFolder("hf", ("org", "repo", "sums"))
    assert [is_url(text) for text in ("s3://b", "file:///b", "/s3://b", "C:/x", "s3:b")] == [True, True] + [False] * 3
    with pytest.raises(ValueError, match="three slashes"):
        parse_location("file://srv/critics")


def test_several_are_parted_by_colons() -> None:
    text = "/a:s3://bucket/critics:b:gs://other:file:///c::/d"
    assert split_locations(text) == ["/a", "s3://bucket/critics", "b", "gs://other", "file:///c", "/d"]
    assert split_locations("") == []


def test_it_is_a_field_of_a_model() -> None:
    class Model(BaseModel):
        place: LocationField

    for text in ("critics/sums", "s3://bucket/critics"):
        model = Model.model_validate({"place": text})
        assert model.place == parse_location(text)
        assert Model.model_validate_json(model.model_dump_json()) == model
    with pytest.raises(ValueError, match="must be a folder"):
        Model.model_validate({"place": 5})
    with pytest.raises(ValueError, match="two slashes"):
        Model.model_validate({"place": "s3://a//b"})
