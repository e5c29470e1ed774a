"""Versions from object stores: fetched once, as a whole, and checked. In memory where a server adds nothing."""

import asyncio
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from moto.s3.responses import S3Response

from qsharp_core.critic import checkpoint
from qsharp_core.critic.digest import digest
from qsharp_core.critic.fetching import FetchOrder, default_cache, fetched, fetched_apart, local_folder
from qsharp_core.errors import CriticError
from qsharp_core.locations import RemoteFolder
from tests.support import bad_critics, models
from tests.support.bad_critics import Fault
from tests.support.object_store import Store, in_memory, object_store, upload


@pytest.fixture(scope="module")
def critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_critic(tmp_path_factory.mktemp("critic") / "1", mlp=8, name="sums")


@pytest.fixture
def memory() -> Iterator[RemoteFolder]:
    """A folder in this process's memory."""
    with in_memory("critics", "sums", "1") as folder:
        yield folder


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with object_store() as made:
        yield made


@pytest.fixture
def gets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The objects that were got from the store in memory."""
    told: list[str] = []
    get = MemoryFileSystem.get_file

    def counted(self: MemoryFileSystem, path: str, *args: Any, **more: Any) -> Any:
        told.append(path)
        return get(self, path, *args, **more)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    return told


def order(folder: RemoteFolder, cache: Path, **more: Any) -> FetchOrder:
    return FetchOrder(url=str(folder), cache=cache, **more)


def kept(cache: Path) -> list[str]:
    """What the cache has that would be taken for a version, or is left of a download."""
    return sorted(p.name for p in cache.iterdir() if p.is_dir() and p.name != ".sources")


def test_what_is_fetched_is_what_was_uploaded(critic: Path, memory: RemoteFolder, tmp_path: Path) -> None:
    upload(critic, memory)
    folder = fetched(order(memory, tmp_path))
    assert folder == tmp_path / digest(critic)
    assert digest(folder) == digest(critic)
    ids = torch.randint(3, models.VOCAB, (2, 16))
    assert torch.equal(checkpoint.load(folder)[1](ids), checkpoint.load(critic)[1](ids))
    assert kept(tmp_path) == [folder.name]


def test_it_is_fetched_once(critic: Path, memory: RemoteFolder, tmp_path: Path, gets: list[str]) -> None:
    upload(critic, memory)
    first = fetched(order(memory, tmp_path))
    assert len(gets) == 4
    assert fetched(order(memory, tmp_path)) == fetched(order(memory, tmp_path, digest=first.name)) == first
    MemoryFileSystem.store.clear()  # whoever knows the digest does not ask
    assert fetched(order(memory, tmp_path, digest=first.name)) == first
    assert len(gets) == 4
    with pytest.raises(CriticError, match=r"memory://critics/sums/1 has no critic\.json"):
        fetched(order(memory, tmp_path))


def test_other_files_than_a_critics_are_left_there(critic: Path, memory: RemoteFolder, tmp_path: Path) -> None:
    more = Path(shutil.copytree(critic, tmp_path / "more"))
    for name in ("README.md", "pytorch_model.bin", "backbone/x.pkl", "backbone/code.py", "backbone/a/b.safetensors",
                 ".hidden.safetensors", "backbone/.safetensors", "other/critic.json"):  # fmt: skip
        (more / name).parent.mkdir(exist_ok=True)
        (more / name).write_bytes(b"\x80\x04.")
    upload(more, memory)
    assert digest(fetched(order(memory, tmp_path / "cache"))) == digest(critic)


def test_a_tokenizer_and_several_files_of_weights_are_fetched(
    critic: Path, memory: RemoteFolder, tmp_path: Path
) -> None:
    large = Path(shutil.copytree(critic, tmp_path / "large"))
    bad_critics.sharded(lambda index: None)(large)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (large / "backbone" / name).write_text("{}")
    upload(large, memory)
    assert digest(fetched(order(memory, tmp_path / "cache"))) == digest(large)


def test_what_is_too_large_is_not_fetched(critic: Path, memory: RemoteFolder, tmp_path: Path, gets: list[str]) -> None:
    upload(critic, memory)
    size = sum(path.stat().st_size for path in critic.rglob("*") if path.is_file())
    with pytest.raises(CriticError, match=r"GiB, and a critic may have .* --critic-max-gib"):
        fetched(order(memory, tmp_path, max_bytes=size - 1))
    assert gets == []
    fetched(order(memory, tmp_path, max_bytes=size))


@pytest.mark.parametrize(
    ("by", "says"), [(-1, "brings more than the .* bytes that its store says"), (1, "came incomplete")]
)
def test_a_store_that_lies_about_a_size(
    critic: Path, memory: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: int, says: str
) -> None:
    upload(critic, memory)
    ls = MemoryFileSystem.ls

    def lies(self: MemoryFileSystem, path: str, detail: bool = True, **more: Any) -> Any:
        return [one | {"size": one["size"] + by} if one["type"] == "file" else one for one in ls(self, path, **more)]

    monkeypatch.setattr(MemoryFileSystem, "ls", lies)
    with pytest.raises(CriticError, match=says):
        fetched(order(memory, tmp_path))
    assert kept(tmp_path) == []


def test_what_changes_while_it_is_fetched_is_refused(
    critic: Path, memory: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(critic, memory)
    get = MemoryFileSystem.get_file

    def changes(self: MemoryFileSystem, path: str, *args: Any, **more: Any) -> Any:
        get(self, path, *args, **more)
        self.pipe_file(path, b"x" * self.size(path))

    monkeypatch.setattr(MemoryFileSystem, "get_file", changes)
    with pytest.raises(CriticError, match="changed while it was fetched"):
        fetched(order(memory, tmp_path))
    assert kept(tmp_path) == []


def test_other_files_than_those_that_were_published(critic: Path, memory: RemoteFolder, tmp_path: Path) -> None:
    upload(critic, memory)
    published = fetched(order(memory, tmp_path / "first")).name
    card = (critic / "critic.json").read_bytes()
    with_blank = card + b"\n"
    MemoryFileSystem().pipe_file("/critics/sums/1/critic.json", with_blank)
    with pytest.raises(CriticError, match="not those that were published"):
        fetched(order(memory, tmp_path / "second", digest=published))
    assert kept(tmp_path / "second") == []
    # Whoever has them already goes on with them, and whoever asks for any gets the new ones.
    assert fetched(order(memory, tmp_path / "first", digest=published)).name == published
    assert fetched(order(memory, tmp_path / "first")).name != published


@pytest.mark.parametrize("spoil", ["changed", "more", "less", "empty"])
def test_a_spoilt_folder_in_the_cache_is_not_used(
    critic: Path, memory: RemoteFolder, tmp_path: Path, gets: list[str], spoil: str
) -> None:
    upload(critic, memory)
    folder = fetched(order(memory, tmp_path))
    match spoil:
        case "changed":
            with (folder / "head.safetensors").open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\xff")
        case "more":
            (folder / "more").write_text("x")
        case "less":
            (folder / "head.safetensors").unlink()
        case "empty":
            shutil.rmtree(folder)
            folder.mkdir()
    assert fetched(order(memory, tmp_path, digest=folder.name)) == folder
    assert digest(folder) == folder.name
    assert len(gets) == 8
    assert kept(tmp_path) == [folder.name]


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QSHARP_CRITIC_CACHE_FOLDER", raising=False)
    assert default_cache() == tmp_path / "qsharp-serve" / "critics"
    monkeypatch.setenv("QSHARP_CRITIC_CACHE_FOLDER", str(tmp_path / "x"))
    assert default_cache() == tmp_path / "x"
    assert local_folder(tmp_path) == tmp_path


def test_a_cache_that_cannot_be_written(critic: Path, memory: RemoteFolder, tmp_path: Path) -> None:
    upload(critic, memory)
    (tmp_path / "cache").write_text("")
    with pytest.raises(CriticError, match="--critic-cache-folder"):
        fetched(order(memory, tmp_path / "cache"))


def test_a_full_disk_is_not_the_stores_fault(
    critic: Path, memory: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    upload(critic, memory)
    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    with pytest.raises(CriticError, match=r"No space left on device: make room .*--critic-cache-folder"):
        fetched(order(memory, tmp_path))
    assert kept(tmp_path) == []


@pytest.mark.parametrize("content", ["", "..", "0" * 64])
def test_a_spoilt_note_is_no_harm(critic: Path, memory: RemoteFolder, tmp_path: Path, content: str) -> None:
    upload(critic, memory)
    folder = fetched(order(memory, tmp_path / "cache"))
    (note,) = (tmp_path / "cache" / ".sources").iterdir()
    note.write_text(content)
    assert fetched(order(memory, tmp_path / "cache")) == folder
    assert (note.read_text(), kept(tmp_path / "cache")) == (folder.name, [folder.name])


# What an object store can hold: no links, pipes or empty folders.
HOSTILE = [fault for fault in bad_critics.SEPARATE if not fault.name.startswith(("a link", "a pipe"))][::4]


@pytest.mark.parametrize("fault", HOSTILE, ids=lambda fault: fault.name)
def test_a_hostile_critic_is_refused_as_one_from_a_disk(
    critic: Path, memory: RemoteFolder, tmp_path: Path, fault: Fault
) -> None:
    spoilt = Path(shutil.copytree(critic, tmp_path / "spoilt"))
    fault.spoil(spoilt)
    if any(path.is_symlink() or not (path.is_file() or path.is_dir()) for path in spoilt.rglob("*")):
        pytest.skip("no object store can hold this")
    upload(spoilt, memory)
    with pytest.raises(CriticError) as raised:
        checkpoint.load(fetched(order(memory, tmp_path / "cache")))
    assert len(str(raised.value)) < 2000


# -- from a server


@pytest.fixture
def there(store: Store, critic: Path, request: pytest.FixtureRequest) -> Iterator[RemoteFolder]:
    """A critic in the bucket."""
    folder = store.upload(critic, store.root / "sums" / "1")
    yield folder
    store.remove(store.root)


def fetching(order: FetchOrder) -> list[str]:
    return [sys.executable, "-m", "qsharp_core.critic.fetching", order.model_dump_json()]


def test_from_a_server_in_a_process_of_its_own(there: RemoteFolder, critic: Path, tmp_path: Path) -> None:
    folder = asyncio.run(fetched_apart(order(there, tmp_path, digest=digest(critic)), 60))
    assert folder == tmp_path / digest(critic) == fetched(order(there, tmp_path))
    assert checkpoint.read_card(folder).name == "sums"


def test_processes_at_once_fetch_once(
    there: RemoteFolder, critic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[str] = []
    get = S3Response.get_object

    def counted(self: S3Response) -> Any:
        got.append(self.path)
        time.sleep(0.2)  # so that they meet
        return get(self)

    monkeypatch.setattr(S3Response, "get_object", counted)
    orders = [order(there, tmp_path), order(there, tmp_path, digest=digest(critic)), order(there, tmp_path)]
    running = [subprocess.Popen(fetching(one), stdout=subprocess.PIPE, text=True) for one in orders]
    answers = [process.communicate(timeout=60)[0] for process in running]
    assert all(f'"folder":"{tmp_path / digest(critic)}"' in answer for answer in answers), answers
    assert len(got) == 4
    assert kept(tmp_path) == [digest(critic)]


# Fetches the order in its argument, and hangs at the first bytes.
HANGS = """
import sys, time
from qsharp_core.critic import fetching

def hang(self, inc=1):
    print("begun", flush=True)
    time.sleep(60)

fetching._AtMost.relative_update = hang
fetching.fetched(fetching.FetchOrder.model_validate_json(sys.argv[1]))
"""


def test_a_killed_download_leaves_nothing_that_is_taken_for_a_version(
    there: RemoteFolder, critic: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", HANGS, order(there, tmp_path).model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        (part,) = kept(tmp_path)
        assert part.endswith(".part")
        found: list[Path] = []
        waits = threading.Thread(target=lambda: found.append(fetched(order(there, tmp_path))))
        waits.start()
        waits.join(1)
        assert waits.is_alive()  # for whoever fetches it now
        process.send_signal(signal.SIGKILL)
    waits.join(30)
    assert found == [tmp_path / digest(critic)]
    assert kept(tmp_path) == [digest(critic)]


def test_a_download_that_takes_too_long_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        began = time.monotonic()
        with pytest.raises(CriticError, match=r"s3://bucket/x was given up: .* within 3 s"):
            asyncio.run(fetched_apart(order(RemoteFolder("s3", ("bucket", "x")), tmp_path), 3))
        assert time.monotonic() - began < 10
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout == b""


def test_what_a_store_refuses(there: RemoteFolder, store: Store, tmp_path: Path) -> None:
    with store.asking_for_rights(), pytest.raises(CriticError, match="the store refuses these credentials"):
        fetched(order(there, tmp_path))
    with pytest.raises(CriticError, match=r"has no critic\.json"):
        fetched(order(there.parent / "2", tmp_path))
    with pytest.raises(CriticError, match=r"no-such-bucket/1 is not there: no such bucket"):
        fetched(order(RemoteFolder("s3", ("no-such-bucket", "1")), tmp_path))
    with pytest.raises(CriticError, match="store refuses"), store.asking_for_rights():
        asyncio.run(fetched_apart(order(there, tmp_path), 60))


def test_no_server_and_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RemoteFolder("s3", ("bucket", "x"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CriticError, match=r"cannot be reached \(NoCredentialsError.* look at the network"):
        fetched(order(folder, tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(CriticError, match=r"cannot be reached \(EndpointConnectionError"):
        fetched(order(folder, tmp_path))


def test_no_driver_and_no_such_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    with pytest.raises(CriticError, match=r"pip install 'qsharp-serve\[gcs\]'"):
        fetched(order(RemoteFolder("gs", ("bucket", "x")), tmp_path))
    with pytest.raises(CriticError, match="fsspec knows no protocol 'nope'"):
        fetched(order(RemoteFolder("nope", ("bucket", "x")), tmp_path))
