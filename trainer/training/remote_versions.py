"""Published versions of critics in an object store: `URL/<name>/<version>/`.

An object store has no rename. So a version is there when its card is, which is written last; and a number is taken
before anything is written under it, by an object that only one can create:

    <name>/.claims/3      the id of the run that publishes, or has published, version 3
    <name>/3/             its files; critic.json last

A run that was killed while it published finds its own claim and goes on. A number whose run never came back stays free
of a version for ever. On a store whose driver cannot create an object exclusively, two publishers at the same moment
may both believe that they have a number: let one publish at a time there.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from qsharp_core.critic.checkpoint import CriticCard
from qsharp_core.critic.folder import CARD
from qsharp_core.errors import CriticError
from qsharp_core.locations import RemoteFolder
from qsharp_core.object_store import check_bucket, entries, reached

CLAIMS = ".claims"


def remote_versions(out: RemoteFolder, name: str) -> list[int]:
    """The numbers of the versions that are published under a name, ascending.

    Raises:
        CriticError: the store cannot be reached, or has no such bucket.
    """
    with reached(out / name) as (fs, path):
        check_bucket(out, fs)
        return [number for number in _numbers(fs, path) if CARD in entries(fs, f"{path}/{number}")]


def is_remotely_published(folder: RemoteFolder) -> bool:
    """Whether a version is there to its end.

    Raises:
        CriticError: the store cannot be reached.
    """
    with reached(folder) as (fs, path):
        return CARD in entries(fs, path)


def publish_remotely(
    out: RemoteFolder, fields: dict[str, Any], save: Callable[[Path, CriticCard], None], run_id: str, working: Path
) -> RemoteFolder:
    """Uploads the next version. If the run has published one already, that version is returned.

    Args:
        out: versions are `out/<name>/<version>`.
        fields: of the card, without its version.
        save: writes the critic's folder.
        run_id: the run's id, which is kept in the card.
        working: folder on this machine's disk, for what is uploaded.

    Raises:
        CriticError: the store refuses, or cannot be reached. What was uploaded is no version; the same run goes on.
    """
    with reached(out / fields["name"]) as (fs, path):
        check_bucket(out, fs)
        number = _claimed(fs, path, run_id)
    version = out / fields["name"] / str(number)
    if is_remotely_published(version):
        return version
    folder = working / "to-publish"
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, CriticCard.model_validate(fields | {"version": str(number), "run": run_id}))
    with reached(version) as (fs, path):
        _upload(fs, folder, path, version)
    shutil.rmtree(folder)
    return version


def _claimed(fs: AbstractFileSystem, path: str, run_id: str) -> int:
    """The number that this run publishes under: the one that it has, or the next that is free."""
    claims = _numbers(fs, f"{path}/{CLAIMS}")
    for number in reversed(claims):
        if fs.cat_file(f"{path}/{CLAIMS}/{number}") == run_id.encode():
            return number
    number = max([0, *claims, *_numbers(fs, path)])
    while True:
        number += 1
        if _created(fs, f"{path}/{CLAIMS}/{number}", run_id.encode()):
            return number


def _upload(fs: AbstractFileSystem, folder: Path, path: str, version: RemoteFolder) -> None:
    """Uploads a folder's files, and its card when all others are there."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    for name in names:
        if name == CARD:
            continue
        fs.put_file(str(folder / name), f"{path}/{name}")
        fs.invalidate_cache()
        size, found = (folder / name).stat().st_size, fs.info(f"{path}/{name}")["size"]
        if found != size:
            raise CriticError(f"{version / name} has {found} bytes in the store, and {size} were sent: publish again")
    if not _created(fs, f"{path}/{CARD}", (folder / CARD).read_bytes()):
        raise CriticError(f"{version} is there already: versions are never overwritten")


def _created(fs: AbstractFileSystem, path: str, content: bytes) -> bool:
    """Creates an object that must not be there; whether it is ours then, also of a request that was sent twice."""
    try:
        fs.pipe_file(path, content, mode="create")
    except OSError:  # FileExistsError, or what a driver makes of a store's own word for it
        fs.invalidate_cache()
        if not fs.exists(path):
            raise
        return bool(fs.cat_file(path) == content)
    return True


def _numbers(fs: AbstractFileSystem, path: str) -> list[int]:
    """The numbers under which anything is, ascending."""
    return sorted(number for number in map(_number, entries(fs, path)) if number is not None)


def _number(name: str) -> int | None:
    return int(name) if name.isascii() and name.isdecimal() else None
