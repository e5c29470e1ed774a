"""Where critics may be loaded from, by default and by `--critic-root`."""

import os
from pathlib import Path

import pytest

from qsharp_core.errors import CriticError
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


def test_the_environment_has_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSHARP_CRITIC_ROOT", os.pathsep.join(["/a", "", "b"]))
    assert Settings().critic_root == (Path("/a"), Path("b"))
    monkeypatch.setenv("QSHARP_CRITIC_ROOT", "")
    assert Settings().critic_root == ()
