"""Reaches folders in object stores through fsspec, and says what to do where that fails.

Credentials and endpoints are the drivers' own business: the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …),
their files, or the machine's role.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from qsharp_core.errors import CriticError
from qsharp_core.locations import RemoteFolder

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Our extra that brings the driver of a protocol with buckets."""
NO_RIGHTS = (errno.EACCES, errno.EPERM)
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def reached(folder: RemoteFolder) -> Iterator[tuple[AbstractFileSystem, str]]:
    """Yields the file system that a folder is in, and the folder's path there. It remembers nothing of earlier looks.

    Whatever a driver raises in the body becomes a `CriticError`, but for errors of this machine's disk.

    Raises:
        CriticError: the protocol is unknown, its driver is not installed, or the store refuses or cannot be reached.
    """
    try:
        yield _opened(folder)
    except CriticError:
        raise
    except OSError as error:
        if error.errno in OF_THE_DISK:
            raise
        raise CriticError(_refusal(folder, error)) from error
    except Exception as error:  # each driver has classes of its own, which need not be installed
        raise CriticError(_refusal(folder, error)) from error


def entries(fs: AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """What is in a folder, by name: fsspec's `info` of each; nothing if there is no such folder."""
    try:
        listed: list[dict[str, Any]] = fs.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    found = {str(info["name"]).rstrip("/").rpartition("/")[2]: info for info in listed}
    return {name: info for name, info in found.items() if name}


def check_bucket(folder: RemoteFolder, fs: AbstractFileSystem) -> None:
    """Asks for a folder's bucket, where there are such: a folder that is not there is an empty one, a bucket is not.

    Raises:
        FileNotFoundError: there is no such bucket.
    """
    if folder.protocol in EXTRAS and folder.parts:
        fs.ls(folder.parts[0], detail=False)


def _opened(folder: RemoteFolder) -> tuple[AbstractFileSystem, str]:
    try:
        fs, path = url_to_fs(str(folder), skip_instance_cache=True)
    except ImportError as error:
        extra = EXTRAS.get(folder.protocol)
        how = f"pip install 'qsharp-serve[{extra}]'" if extra else "install its driver"
        raise CriticError(f"{folder}: {_told(error)}: {how}") from error
    except ValueError as error:
        raise CriticError(f"{folder}: fsspec knows no protocol {folder.protocol!r} ({_told(error)})") from error
    return fs, path


def _refusal(folder: RemoteFolder, error: Exception) -> str:
    """What happened, and what to do."""
    told = _told(error)
    if isinstance(error, FileNotFoundError):
        return f"{folder} is not there: no such bucket, folder or file ({told})"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) in NO_RIGHTS:
        return (
            f"{folder}: the store refuses these credentials, or they have no right to this ({told}): give this process "
            "others, as its driver wants them"
        )
    return (
        f"{folder} cannot be reached ({told}): look at the network, the store's endpoint and this process's credentials"
    )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
