"""Who holds which key: the file, its hashes, and what a running server sees of a change."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from qsharp_core import cli
from qsharp_core.errors import ConfigError
from server.access import keys
from server.access.keys import KeyRing
from server.access.principal import Principal


def test_a_key_is_found_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    alice, root = keys.add(path, "alice"), keys.add(path, "root", admin=True)
    assert alice not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    ring = KeyRing(["plain"], "boss", path)
    assert ring.find(alice) == Principal("alice")
    assert ring.find(root) == Principal("root", admin=True)
    assert ring.find("plain") == Principal("default")
    assert ring.find("boss") == Principal("admin", admin=True)
    for wrong in ("", "alice", alice[:-1], alice + " ", "\ud800", "é" * 1000):
        assert ring.find(wrong) is None


def test_a_change_is_seen_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "LOOK_SECONDS", 0.0)
    path = tmp_path / "keys.json"
    first = keys.add(path, "first")
    ring = KeyRing(path=path)
    second = keys.add(path, "second")
    assert ring.find(second) == Principal("second")
    keys.revoke(path, "first")
    assert ring.find(first) is None
    path.write_text("{")  # half written by somebody's editor: what was read holds
    assert ring.find(second) == Principal("second")
    path.unlink()
    assert ring.find(second) == Principal("second")


def test_the_file_is_looked_at_once_in_a_while(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first = keys.add(path, "first")
    ring = KeyRing(path=path)
    assert ring.find(first) is not None
    keys.revoke(path, "first")
    assert ring.find(first) is not None
    time.sleep(keys.LOOK_SECONDS)
    assert ring.find(first) is None


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 65, "ä", "default", "admin", "taken"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    path = tmp_path / "keys.json"
    keys.add(path, "taken")
    before = path.read_bytes()
    with pytest.raises(ConfigError):
        keys.add(path, name)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"keys": 3}', '{"version": 2}', '{"keys": [{"name": "a"}]}',
        '{"keys": [{"name": "a", "sha256": "12"}]}', "\x00", "[" * 5000,
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"keys\.json"):
        KeyRing(path=path)


def _add(path: Path, start: int) -> None:
    for i in range(start, start + 10):
        keys.add(path, f"k{i}")


def test_additions_from_several_processes_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add, args=(path, 10 * i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert {entry.name for entry in keys.read(path).keys} == {f"k{i}" for i in range(30)}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "keys.json"
    assert cli.main(["keys", "--file", str(path), "add", "alice", "--admin"]) == 0
    key = capsys.readouterr().out.strip()
    assert KeyRing(path=path).find(key) == Principal("alice", admin=True)
    assert cli.main(["keys", "--file", str(path), "list"]) == 0
    listed = capsys.readouterr().out
    assert "alice" in listed
    assert "everything" in listed
    assert json.loads(path.read_text())["keys"][0]["sha256"] not in listed
    assert cli.main(["keys", "--file", str(path), "revoke", "bob"]) == 1
    assert "bob" in capsys.readouterr().err
    assert cli.main(["keys", "--file", str(path), "revoke", "alice"]) == 0
    assert keys.read(path).keys == []
