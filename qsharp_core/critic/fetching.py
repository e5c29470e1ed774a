"""Versions from object stores: each is fetched once, into a cache on this machine's disk, and loaded from there.

    CACHE/<digest>/            a version's files, by their digest: what is there is whole
    CACHE/.sources/<key>       the digest of what was fetched from a URL, as its store listed it then
    CACHE/.<key>.part/         a download; whoever holds .<key>.lock writes it, and removes what a killed one has left

Nothing of a store is trusted. Only files that a critic consists of are fetched, no more bytes of them than a critic may
have, and a folder in the cache is hashed before it is used.

    python -m qsharp_core.critic.fetching ORDER

fetches in a process of its own (`fetched_apart`): a download that hangs can be killed, and takes no time from whoever
waits for it.
"""

import asyncio
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock
from fsspec.callbacks import Callback
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qsharp_core.critic.digest import digest
from qsharp_core.critic.files import MOST_FILES
from qsharp_core.critic.folder import BACKBONE, CARD, DEFAULT_MAX_BYTES, HEAD, belongs_to_backbone
from qsharp_core.disk import whole_file
from qsharp_core.errors import CriticError
from qsharp_core.locations import Location, RemoteFolder
from qsharp_core.object_store import check_bucket, entries, reached
from qsharp_core.user_cache import default_cache_dir

VARIABLE = "QSHARP_CRITIC_CACHE_FOLDER"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class FetchOrder(BaseModel):
    """What is to be fetched.

    Attributes:
        url: of a version's folder.
        cache: folder of the cache.
        max_bytes: that the version's files may have together.
        digest: that they must have (`qsharp_core.critic.digest`); None: any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    url: str
    cache: Path
    max_bytes: int = DEFAULT_MAX_BYTES
    digest: str | None = Field(default=None, pattern=f"^{_DIGEST.pattern}$")


class FetchAnswer(BaseModel):
    """What came of an order: the folder on this machine's disk, or why there is none."""

    folder: Path | None = None
    error: str | None = None


def default_cache() -> Path:
    """`$QSHARP_CRITIC_CACHE_FOLDER`, or `critics` in this project's part of the user's cache."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else default_cache_dir() / "critics"


def local_folder(location: Location, max_bytes: int = DEFAULT_MAX_BYTES) -> Path:
    """The folder itself if it is on this machine's disk, else its copy in the default cache; it blocks.

    Raises:
        CriticError: it cannot be fetched.
    """
    if isinstance(location, Path):
        return location
    return fetched(FetchOrder(url=str(location), cache=default_cache(), max_bytes=max_bytes))


def fetched(order: FetchOrder) -> Path:
    """The folder of a version in the cache. What is there under the digest that is asked for is not fetched.

    Two processes at once fetch a version once: the other waits, and finds it.

    Raises:
        CriticError: the store cannot be reached, the version is incomplete or too large, or has another digest.
    """
    folder = RemoteFolder.of(order.url)
    try:
        (order.cache / ".sources").mkdir(parents=True, exist_ok=True)
        if order.digest is not None and (found := _sound(order.cache, order.digest)):
            return found
        key = _key(order.url)
        with FileLock(order.cache / f".{key}.lock"):
            # Whoever held the lock before may have fetched it.
            if order.digest is not None and (found := _sound(order.cache, order.digest)):
                return found
            return _fetch(folder, order, order.cache / f".{key}.part")
    except OSError as error:
        raise CriticError(
            f"{folder} was not fetched into {order.cache}: {error.strerror or error}: make room or give rights there, "
            f"or choose another folder (--critic-cache-folder, {VARIABLE})"
        ) from error


async def fetched_apart(order: FetchOrder, seconds: float) -> Path:
    """As `fetched`, in a process of its own, which is killed after so many seconds, or when this is cancelled.

    Raises:
        CriticError: as `fetched`; or it took too long.
    """
    command = [sys.executable, "-m", __name__, order.model_dump_json()]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
    except TimeoutError as error:
        raise CriticError(
            f"{order.url} was given up: it was not fetched within {seconds:g} s (--critic-load-seconds)"
        ) from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        answer = FetchAnswer.model_validate_json(output.splitlines()[-1])
    except (IndexError, ValidationError) as error:
        raise CriticError(
            f"{order.url} was not fetched: what fetches it ended with status {process.returncode}; see the log"
        ) from error
    if answer.folder is None:
        raise CriticError(str(answer.error))
    return answer.folder


def _fetch(folder: RemoteFolder, order: FetchOrder, temporary: Path) -> Path:
    listed = _listed(folder, order.max_bytes)
    note = order.cache / ".sources" / _key(order.url, listed)
    known = note.read_text() if note.is_file() else None
    if known is not None and order.digest in (None, known) and (found := _sound(order.cache, known)):
        return found
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _download(folder, listed, temporary)
        if _listed(folder, order.max_bytes) != listed:
            raise CriticError(f"{folder} changed while it was fetched: a version never changes; publish another one")
        found_digest = digest(temporary)
        if order.digest not in (None, found_digest):
            raise CriticError(f"the files at {folder} are not those that were published ({found_digest:.12}…)")
        kept = _kept(order.cache, found_digest, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with whole_file(note) as written:
        written.write_text(found_digest)
    return kept


def _download(folder: RemoteFolder, listed: dict[str, dict[str, Any]], into: Path) -> None:
    for name in listed:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
    with reached(folder) as (fs, _):
        for name, info in listed.items():
            fs.get_file(info["name"], str(into / name), callback=_AtMost(info["size"], f"{folder}/{name}"))
    for name, info in listed.items():
        if (size := (into / name).stat().st_size) != info["size"]:
            raise CriticError(f"{folder}/{name} came incomplete: {size} of {info['size']} bytes")


def _listed(folder: RemoteFolder, max_bytes: int) -> dict[str, dict[str, Any]]:
    """What a store says of each file that a critic consists of, by its name within the folder.

    Raises:
        CriticError: it is no version's folder, or is too large.
    """
    inside: dict[str, dict[str, Any]] = {}
    with reached(folder) as (fs, path):
        here = entries(fs, path)
        if not here:
            check_bucket(folder, fs)
        if BACKBONE in here:
            inside = entries(fs, here[BACKBONE]["name"])
    if CARD not in here:
        raise CriticError(f"{folder} has no {CARD}: no such folder, or a version that is not published to its end")
    files = {name: info for name, info in here.items() if name in (CARD, HEAD)}
    files |= {f"{BACKBONE}/{name}": info for name, info in inside.items() if belongs_to_backbone(name)}
    files = {name: info for name, info in sorted(files.items()) if info["type"] == "file"}
    if len(files) > MOST_FILES:
        raise CriticError(f"{folder} holds more than {MOST_FILES} files: it is no critic's folder")
    sizes = [info["size"] for info in files.values()]
    if any(not isinstance(size, int) or size < 0 for size in sizes):
        raise CriticError(f"{folder}: its store does not say how large each file is")
    if (total := sum(sizes)) > max_bytes:
        raise CriticError(
            f"{folder} holds {total / 2**30:.3g} GiB, and a critic may have {max_bytes / 2**30:.3g}: see "
            "--critic-max-gib"
        )
    return files


def _sound(cache: Path, name: str) -> Path | None:
    """The folder in the cache that is called by this digest, if its files have it."""
    folder = cache / name
    if _DIGEST.fullmatch(name) is None or not folder.is_dir():
        return None
    try:
        return folder if digest(folder) == name else None
    except CriticError:  # something else than files is in it
        return None


def _kept(cache: Path, name: str, temporary: Path) -> Path:
    """Puts what was fetched where it is looked for. Whoever came first has put the same files there."""
    if found := _sound(cache, name):
        return found
    folder, spoilt = cache / name, temporary.with_suffix(".spoilt")
    if folder.exists():
        shutil.rmtree(spoilt, ignore_errors=True)
        folder.rename(spoilt)
        shutil.rmtree(spoilt, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if _sound(cache, name) is None:
            raise
    return folder


def _key(*what: object) -> str:
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()


class _AtMost(Callback):
    """Ends a download that brings more bytes than the store said.

    Args:
        most: bytes.
        url: for the message.
    """

    def __init__(self, most: int, url: str) -> None:
        super().__init__()
        self._most, self._url = most, url

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self._most:
            raise CriticError(f"{self._url} brings more than the {self._most} bytes that its store says")


def _main(order: FetchOrder) -> FetchAnswer:
    try:
        return FetchAnswer(folder=fetched(order))
    except CriticError as error:
        return FetchAnswer(error=str(error))


if __name__ == "__main__":
    print(_main(FetchOrder.model_validate_json(sys.argv[1])).model_dump_json())
