"""A folder's digest tells its files, and nothing else, apart."""

import os
from pathlib import Path

import pytest

from qsharp_core.critic.digest import digest
from qsharp_core.errors import CriticError


def made(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_the_same_files_have_the_same_digest(tmp_path: Path) -> None:
    one, two = made(tmp_path / "1", a="x", b__c="y"), made(tmp_path / "2", b__c="y", a="x")
    os.utime(two / "a", (1, 1))
    assert digest(one) == digest(two)


@pytest.mark.parametrize("other", [{"a": "y"}, {"a": ""}, {"b": "x"}, {"a": "x", "b": ""}, {"d__a": "x"}])
def test_other_files_have_another(tmp_path: Path, other: dict[str, str]) -> None:
    assert digest(made(tmp_path / "1", a="x")) != digest(made(tmp_path / "2", **other))


def test_names_and_contents_are_not_confused(tmp_path: Path) -> None:
    assert digest(made(tmp_path / "1", a="1", b="2")) != digest(made(tmp_path / "2", a="2", b="1"))


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CriticError, match="cannot be read"):
        digest(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CriticError, match="pipe is no regular file"):
        digest(tmp_path)
