"""Where critics may be loaded from, by default and by `--critic-root`."""

import os
from pathlib import Path

import pytest

from qsharp_core.errors import CriticError
from qsharp_core.locations import RemoteFolder
from server.critics.roots import CriticRoots
from server.errors import ForbiddenError
from server.settings import Settings


def admits(roots: CriticRoots, path: object) -> bool:
    try:
        roots.admit(str(path))
    except ForbiddenError:
        return False
    return True


def test_given_folders_and_what_is_in_them(tmp_path: Path) -> None:
    roots = CriticRoots.of([tmp_path / "a", tmp_path / "b"], [tmp_path / "c"])
    assert [admits(roots, tmp_path / name) for name in ("a", "a/x/1", "b/1")] == [True] * 3
    assert [admits(roots, tmp_path / name) for name in ("c", "ab", "a/../c", ".", "a/../..")] == [False] * 5


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "in").symlink_to(tmp_path / "root")
    roots = CriticRoots.of([tmp_path / "in"], [])  # a root may be a link
    assert roots.admit(str(tmp_path / "in" / "1")) == tmp_path / "root" / "1"
    assert not admits(roots, tmp_path / "root" / "out")


def test_without_any_the_folder_it_was_started_in_and_its_own_critics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    roots = CriticRoots.of([], [tmp_path / "named" / "3"])
    assert [admits(roots, path) for path in ("critics/sums/1", ".", tmp_path / "named" / "3")] == [True] * 3
    assert [admits(roots, path) for path in (tmp_path / "named" / "4", "..", "/")] == [False] * 3
    monkeypatch.chdir("/")  # not the whole machine
    roots = CriticRoots.of([], [tmp_path / "named" / "3"])
    assert [admits(roots, path) for path in (tmp_path / "named" / "3", tmp_path, "/tmp")] == [True, False, False]
    assert admits(CriticRoots.of([Path("/")], []), tmp_path)  # unless it is said


@pytest.mark.parametrize("path", ["\0", "a\0b"])
def test_no_path(path: str) -> None:
    with pytest.raises(CriticError, match="path: "):
        CriticRoots.of([], []).admit(path)


@pytest.mark.parametrize(
    "path", ["s3://bucket/../x", "s3://bucket//x", "simplecache::s3://bucket/x", "s3://a:b@bucket"]
)
def test_no_url_of_a_folder(path: str) -> None:
    with pytest.raises(CriticError if "::" not in path else ForbiddenError, match="path: "):
        CriticRoots.of([RemoteFolder("s3", ())], []).admit(path)


def test_urls_and_what_is_under_them(tmp_path: Path) -> None:
    roots = CriticRoots.of([tmp_path, RemoteFolder.of("s3://bucket/critics")], [])
    inside = ("s3://bucket/critics", "s3://bucket/critics/sums/3/", "S3://bucket/critics/x", f"file://{tmp_path}/x")
    outside = (
        "s3://bucket/critics-evil/sums", "s3://bucket", "s3://bucket/other/critics", "s3://other/critics",
        "gs://bucket/critics/x", "memory://bucket/critics/x", "file:///etc", f"file://{tmp_path}/../x",
        "s3:/bucket/critics", f"s3:/{tmp_path}",
    )  # fmt: skip
    assert [admits(roots, path) for path in inside] == [True] * len(inside)
    assert [admits(roots, path) for path in outside] == [False] * len(outside)
    assert roots.admit("s3://bucket/critics/sums/3/") == RemoteFolder("s3", ("bucket", "critics", "sums", "3"))
    with pytest.raises(ForbiddenError, match=r"s3://other/x is not where .* under /.*, s3://bucket/critics: .* URL"):
        roots.admit("s3://other/x")


def test_no_url_unless_it_is_said(tmp_path: Path) -> None:
    started_with = RemoteFolder.of("s3://bucket/critics/sums/1")
    roots = CriticRoots.of([], [started_with])
    assert [admits(roots, url) for url in (started_with, "s3://bucket/critics/sums/2")] == [True, False]
    assert not admits(CriticRoots.of([Path("/")], []), "s3://bucket/x")
    assert admits(CriticRoots.of([RemoteFolder.of("s3://")], []), "s3://bucket/x")


def test_the_environment_has_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSHARP_CRITIC_ROOT", os.pathsep.join(["/a", "", "s3://bucket/critics", "b"]))
    assert Settings().critic_root == (Path("/a"), RemoteFolder("s3", ("bucket", "critics")), Path("b"))
    monkeypatch.setenv("QSHARP_CRITIC_ROOT", "")
    assert Settings().critic_root == ()
