"""Keys and their holders: a file of named keys, hashed, beside the keys of the command line.

qsharp keys add alice            # prints the key, once
qsharp serve --keys keys.json    # reads the file again when it changes
"""

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qsharp_core.disk import whole_file
from qsharp_core.errors import ConfigError
from server.access.principal import UNNAMED, Principal

logger = logging.getLogger("vllm.qsharp")
ADMIN = "admin"  # holds the key of `--admin-key`
LOOK_SECONDS = 1.0  # between two looks at the file
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class NamedKey(BaseModel):
    """An entry of the file.

    Attributes:
        sha256: of the key, in hexadecimal. The keys are random, so that a slow hash would protect nothing.
        created: in seconds since the epoch.
    """

    model_config = ConfigDict(extra="forbid")
    name: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    admin: bool = False
    created: float = 0.0


class KeyFile(BaseModel):
    """What the file holds."""

    model_config = ConfigDict(extra="forbid")
    version: int = Field(default=1, ge=1, le=1)
    keys: list[NamedKey] = []


def read(path: Path) -> KeyFile:
    """The keys of a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return KeyFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path} is no file of keys: {where or 'it'}: {first['msg']}") from error
    except OSError as error:
        raise ConfigError(f"the keys in {path} cannot be read: {error.strerror}") from error


def add(path: Path, name: str, admin: bool = False) -> str:
    """Adds a holder to the file, and returns the key, which is stored nowhere.

    Raises:
        ConfigError: the name is taken or cannot be one, or the file cannot be read.
    """
    key = f"qs-{secrets.token_urlsafe(32)}"
    with _locked(path):
        file = read(path) if path.exists() else KeyFile()
        if name in {UNNAMED, ADMIN, *(entry.name for entry in file.keys)}:
            raise ConfigError(f"there is a key of {name} already: revoke it first, or take another name")
        try:
            entry = NamedKey(name=name, sha256=_hash(key).hex(), admin=admin, created=time.time())
        except ValidationError as error:
            raise ConfigError(
                "a name must have 1 to 64 letters, digits, dots, underscores and dashes, and begin with a letter or "
                f"digit; got {name!r:.80}"
            ) from error
        _write(path, KeyFile(keys=[*file.keys, entry]))
    return key


def revoke(path: Path, name: str) -> None:
    """Takes a holder off the file.

    Raises:
        ConfigError: nobody of that name is there.
    """
    with _locked(path):
        file = read(path)
        rest = [entry for entry in file.keys if entry.name != name]
        if len(rest) == len(file.keys):
            raise ConfigError(f"{path} has no key of {name!r:.80}")
        _write(path, KeyFile(keys=rest))


class KeyRing:
    """Finds the holder of a key.

    Args:
        users: keys of `--api-key`.
        admin: the key of `--admin-key`; None for a server that has none.
        path: the file of named keys; None for a server that has none. It is read again when it has changed.

    Raises:
        ConfigError: the file cannot be read.
    """

    def __init__(self, users: Iterable[str] = (), admin: str | None = None, path: Path | None = None) -> None:
        self._given = {_hash(key): Principal(UNNAMED) for key in users}
        if admin is not None:
            self._given[_hash(admin)] = Principal(ADMIN, admin=True)
        self._path = path
        self._named: Mapping[bytes, Principal] = {}
        self._stamp: tuple[int, int] | None = None
        self._looked = 0.0
        if path is not None:
            self._named = _principals(read(path))
            self._stamp = _stamp(path)

    @property
    def guards_users(self) -> bool:
        """Whether there is a way to have a user's key, so that who has none is refused."""
        return self._path is not None or any(not holder.admin for holder in self._given.values())

    @property
    def has_admin(self) -> bool:
        """Whether anybody is the admin."""
        return any(holder.admin for holder in [*self._given.values(), *self._named.values()])

    def find(self, key: str) -> Principal | None:
        """The holder of a key; None if nobody holds it.

        Hashes are looked up instead of keys, so the time that it takes tells nothing about a key.
        """
        self._look()
        hashed = _hash(key)
        return self._given.get(hashed) or self._named.get(hashed)

    def _look(self) -> None:
        """Reads the file again if it has changed; one that cannot be read leaves the keys as they are."""
        now = time.monotonic()
        if self._path is None or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        stamp = _stamp(self._path)
        if stamp is None or stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._named = _principals(read(self._path))
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)


def _principals(file: KeyFile) -> Mapping[bytes, Principal]:
    return {bytes.fromhex(entry.sha256): Principal(entry.name, entry.admin) for entry in file.keys}


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _locked(path: Path) -> FileLock:
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock", mode=0o600)


def _write(path: Path, file: KeyFile) -> None:
    with whole_file(path) as temporary:
        temporary.touch(0o600)
        temporary.write_text(json.dumps(file.model_dump(), indent=2) + "\n")
