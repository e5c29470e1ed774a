"""A PostgreSQL of its own on loopback, from Debian's package, gone at the end.

`initdb` refuses to run as root, so root starts it as an unprivileged user.
"""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


class NoPostgresError(Exception):
    """It is not installed, or cannot be started by this user."""


@dataclass(frozen=True)
class Postgres:
    """A running PostgreSQL.

    Attributes:
        url: of an empty database.
        stop: ends it at once, as a crash would.
        start: starts it again.
    """

    url: str
    stop: Callable[[], None]
    start: Callable[[], None]


@contextmanager
def running_postgres(settings: Mapping[str, str] | None = None, folder: Path | None = None) -> Iterator[Postgres]:
    """Yields one that runs, and must run at the end.

    Args:
        settings: of the server, by name.
        folder: where its data go; None: the system's temporary folder.

    Raises:
        NoPostgresError
    """
    binaries = _binaries()
    if binaries is None:
        raise NoPostgresError("PostgreSQL is not installed (apt-get install postgresql)")
    who: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="qsharp-postgres-", dir=folder))
    if os.geteuid() == 0:
        user = _unprivileged()
        os.chown(folder, user.pw_uid, user.pw_gid)
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        with (folder / "output").open("ab") as output:  # pg_ctl hands it on to the server: no pipe would end
            done = subprocess.run([binaries / program, *arguments], stdout=output, stderr=output, cwd=folder, **who)
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{(folder / 'output').read_text()}")

    data = str(folder / "data")
    named = {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(folder), **(settings or {})}
    options = f"-p {port} " + " ".join(f"-c {name}={value}" for name, value in named.items())
    try:
        run("initdb", "-D", data, "-U", "qsharp", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        start = partial(run, "pg_ctl", "-D", data, "-w", "-o", options, "start")
        stop = partial(run, "pg_ctl", "-D", data, "-m", "immediate", "stop")
        start()
        try:
            yield Postgres(f"postgresql://qsharp@127.0.0.1:{port}/postgres", stop, start)
        finally:
            stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return debian[-1].parent if debian else None


def _unprivileged() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise NoPostgresError("root cannot run PostgreSQL, and there is no user postgres or nobody")
