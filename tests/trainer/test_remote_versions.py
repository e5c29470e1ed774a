"""Versions in an object store: whole or not there, each number once, and the same files as on a disk."""

import errno
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from qsharp_core.critic import checkpoint
from qsharp_core.critic.checkpoint import CriticCard
from qsharp_core.critic.digest import digest
from qsharp_core.critic.fetching import FetchOrder, fetched
from qsharp_core.errors import CriticError
from qsharp_core.locations import RemoteFolder
from qsharp_core.object_store import entries
from tests.support import models
from tests.support.object_store import Store, in_memory, object_store
from trainer.loop.activation import ServedCritic
from trainer.loop.versions import LoopError, Version
from trainer.training.publish import is_published, latest, next_version, publish, versions

FIELDS: dict[str, Any] = {"name": "sums", "head": "V", "distribution": {"kind": "bernoulli"}}


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with object_store() as made:
        yield made


@pytest.fixture
def out() -> Iterator[RemoteFolder]:
    """A folder in this process's memory."""
    with in_memory("critics") as folder:
        yield folder


def save(folder: Path, card: CriticCard) -> None:
    """Stands for a critic's `save`: the same names, and a content that the version's number is in."""
    (folder / "backbone").mkdir(parents=True)
    for name in ("critic.json", "head.safetensors", "backbone/config.json", "backbone/model.safetensors"):
        (folder / name).write_text(card.model_dump_json() if name == "critic.json" else f"{name} {card.version}")


def test_a_run_publishes_once(out: RemoteFolder, tmp_path: Path) -> None:
    assert (versions(out, "sums"), latest(out, "sums"), next_version(out, "sums")) == ([], None, 1)
    first = publish(out, FIELDS, save, "run-a", tmp_path)
    assert publish(out, FIELDS, save, "run-b", tmp_path) == out / "sums" / "2"
    assert publish(out, FIELDS, save, "run-a", tmp_path) == first == out / "sums" / "1"
    assert (versions(out, "sums"), latest(out, "sums"), next_version(out, "sums")) == ([1, 2], out / "sums" / "2", 3)
    assert is_published(first)
    assert not is_published(out / "sums" / "3")
    assert list(tmp_path.iterdir()) == []
    # Somebody has put files there by hand: their number is taken.
    MemoryFileSystem().pipe_file("/critics/sums/10/head.safetensors", b"")
    assert publish(out, FIELDS, save, "run-c", tmp_path) == out / "sums" / "11"
    assert versions(out, "sums") == [1, 2, 11]


@pytest.mark.parametrize("at", range(4))
def test_a_run_that_was_killed_goes_on_under_its_number(
    out: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Killed before each of its files, of which the card is the last; and meanwhile another run publishes."""
    put, pipe = MemoryFileSystem.put_file, MemoryFileSystem.pipe_file
    written: list[str] = []

    def dies(write: Any, self: MemoryFileSystem, *args: Any, **more: Any) -> Any:
        if ".claims" not in args[0]:
            if len(written) == at:
                raise KeyboardInterrupt
            written.append(args[0])
        return write(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", lambda self, *args, **more: dies(put, self, *args, **more))
        patch.setattr(MemoryFileSystem, "pipe_file", lambda self, *args, **more: dies(pipe, self, *args, **more))
        with pytest.raises(KeyboardInterrupt):
            publish(out, FIELDS, save, "run-a", tmp_path)
    assert versions(out, "sums") == []
    with pytest.raises(CriticError, match=r"has no critic\.json"):
        fetched(FetchOrder(url=str(out / "sums" / "1"), cache=tmp_path / "cache"))
    assert publish(out, FIELDS, save, "run-b", tmp_path) == out / "sums" / "2"
    assert publish(out, FIELDS, save, "run-a", tmp_path) == out / "sums" / "1"
    folder = fetched(FetchOrder(url=str(out / "sums" / "1"), cache=tmp_path / "cache"))
    assert (folder / "head.safetensors").read_text() == "head.safetensors 1"


def test_a_version_is_never_overwritten(out: RemoteFolder, tmp_path: Path) -> None:
    def slow(folder: Path, card: CriticCard) -> None:
        save(folder, card)
        MemoryFileSystem().pipe_file("/critics/sums/1/critic.json", b"somebody's")

    with pytest.raises(CriticError, match=r"memory://critics/sums/1 is there already"):
        publish(out, FIELDS, slow, "run-a", tmp_path)
    assert MemoryFileSystem().cat_file("/critics/sums/1/critic.json") == b"somebody's"


def test_a_store_with_a_word_of_its_own_for_what_is_there(
    out: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some copies of S3 refuse without saying which condition did not hold: s3fs makes an `OSError` of that."""
    pipe = MemoryFileSystem.pipe_file

    def strange(self: MemoryFileSystem, *args: Any, **more: Any) -> Any:
        try:
            return pipe(self, *args, **more)
        except FileExistsError:
            raise OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold") from None

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", strange)
    claims, taken = "/critics/sums/.claims", "/critics/sums/.claims/1"

    def late(fs: MemoryFileSystem, path: str) -> dict[str, Any]:
        found = entries(fs, path)
        if path == claims and taken not in MemoryFileSystem.store:  # another run takes it after this look
            pipe(fs, taken, b"run-b")
        return found

    monkeypatch.setattr("trainer.training.remote_versions.entries", late)
    assert publish(out, FIELDS, save, "run-a", tmp_path) == out / "sums" / "2"


def test_what_is_published_is_what_is_fetched(store: Store, tmp_path: Path) -> None:
    card, critic = checkpoint.load(models.write_critic(tmp_path / "made", name="sums", mlp=8))
    fields = card.model_dump(exclude={"version"})
    kept: list[Path] = []

    def save_it(folder: Path, card: CriticCard) -> None:
        checkpoint.save(folder, card, critic)
        kept.append(Path(shutil.copytree(folder, tmp_path / "kept")))

    version = publish(store.root, fields, save_it, "run-a", tmp_path)
    folder = fetched(FetchOrder(url=str(version), cache=tmp_path / "cache"))
    assert folder.name == digest(folder) == digest(kept[0])
    found, loaded = checkpoint.load(folder)
    assert (found.key, (found.model_extra or {})["run"]) == ("sums@1", "run-a")
    for name, weight in loaded.state_dict().items():
        assert weight.equal(critic.state_dict()[name]), name
    store.remove(store.root)


def test_publishers_at_once_take_a_number_each(store: Store, tmp_path: Path) -> None:
    def one(number: int) -> str:
        working = tmp_path / str(number)
        working.mkdir()
        return str(publish(store.root, FIELDS, save, f"run-{number}", working))

    with ThreadPoolExecutor(8) as pool:
        published = list(pool.map(one, range(8)))
    assert sorted(published) == [f"{store.root}/sums/{number}" for number in range(1, 9)]
    found = store.objects(store.root / "sums")
    for number, place in enumerate(published):
        version = place.rpartition("/")[2]
        assert found[f".claims/{version}"] == f"run-{number}".encode()
        assert found[f"{version}/head.safetensors"] == f"head.safetensors {version}".encode()
        assert CriticCard.model_validate_json(found[f"{version}/critic.json"]).version == version
    store.remove(store.root)


def test_what_a_store_refuses(store: Store, tmp_path: Path) -> None:
    nowhere = RemoteFolder.of("s3://no-such-bucket/critics")
    for call in (lambda out: versions(out, "sums"), lambda out: publish(out, FIELDS, save, "run-a", tmp_path)):
        with pytest.raises(CriticError, match="no such bucket"):
            call(nowhere)
        with store.asking_for_rights(), pytest.raises(CriticError, match="the store refuses these credentials"):
            call(store.root)


def test_a_loops_version_is_where_the_server_finds_it(out: RemoteFolder, tmp_path: Path) -> None:
    publish(out, FIELDS, save, "run-a", tmp_path)
    version = Version.of("sums@1", out)
    assert (version, version.on_disk.name) == (Version.at(out / "sums" / "1"), digest(version.on_disk))
    with pytest.raises(LoopError, match=r"memory://critics/sums/2 is gone"):
        Version.of("sums@2", out)
    served = ServedCritic(None, "sums", out)  # type: ignore[arg-type]
    assert served._seen_at == out
