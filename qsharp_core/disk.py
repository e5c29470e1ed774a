"""Writes files so that they survive a loss of power."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to, whose file becomes `path` at the end: the old file is there or the new one, whole.

    Where the body raises, the old one stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to write to, which becomes `folder` at the end: it is there as a whole or not at all.

    Raises:
        FileExistsError: `folder` exists; versions are never overwritten.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: versions are never overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    for path in temporary.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors lets only the owner read, but the server may run as another user
    for path in [*temporary.rglob("*"), temporary]:
        fsync(path)
    temporary.rename(folder)
    fsync(folder.parent)
