"""A real S3 server for tests: moto's, in a thread, on a port of its own; what it holds is in memory."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

from qsharp_core.locations import RemoteFolder
from qsharp_core.object_store import reached

BUCKET = "critics-of-tests"


@dataclass(frozen=True)
class Store:
    """A running server.

    Attributes:
        url: of its API.
        environment: what a process needs to use it.
    """

    url: str
    environment: dict[str, str]

    @property
    def root(self) -> RemoteFolder:
        """A folder in its bucket."""
        return RemoteFolder("s3", (BUCKET, "critics"))

    def objects(self, folder: RemoteFolder) -> dict[str, bytes]:
        """The content of what is in a folder, by name."""
        with reached(folder) as (fs, path):
            return {name.removeprefix(f"{path}/"): fs.cat_file(name) for name in fs.find(path)}

    def upload(self, folder: Path, to: RemoteFolder) -> RemoteFolder:
        """Uploads all files of a folder, and returns where they are."""
        upload(folder, to)
        return to

    def write(self, folder: RemoteFolder, name: str, content: bytes) -> None:
        """Writes an object, whatever is there."""
        with reached(folder) as (fs, path):
            fs.pipe_file(f"{path}/{name}", content)

    def remove(self, folder: RemoteFolder) -> None:
        """Removes a folder."""
        with reached(folder) as (fs, path):
            fs.rm(path, recursive=True)

    @contextmanager
    def asking_for_rights(self) -> Iterator[None]:
        """While this goes on, only credentials that it knows are taken: none."""
        httpx.post(f"{self.url}/moto-api/reset-auth", content=b"0").raise_for_status()
        try:
            yield
        finally:
            httpx.post(f"{self.url}/moto-api/reset-auth", content=b"inf").raise_for_status()


def upload(folder: Path, to: RemoteFolder) -> None:
    """Uploads all files of a folder, whatever they are."""
    with reached(to) as (fs, path):
        for file in folder.rglob("*"):
            if file.is_file():
                fs.put_file(str(file), f"{path}/{file.relative_to(folder).as_posix()}")


@contextmanager
def in_memory(*parts: str) -> Iterator[RemoteFolder]:
    """A folder in this process's memory, in which there is nothing."""

    def clear() -> None:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]

    clear()
    yield RemoteFolder("memory", parts)
    clear()


def _one_at_a_time(put: Callable[[S3Response], Any]) -> Callable[[S3Response], Any]:
    """S3 makes an object that must not be there in one step; moto looks first and then makes it."""
    lock = threading.Lock()

    def locked(response: S3Response) -> Any:
        with lock:
            return put(response)

    return locked


@contextmanager
def object_store() -> Iterator[Store]:
    """A server with an empty bucket. Drivers in this process use it, and in those that it starts."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", _one_at_a_time(S3Response.put_object))
        for name, value in environment.items():
            patch.setenv(name, value)
        httpx.post(f"{url}/moto-api/reset").raise_for_status()  # it outlives its server
        with reached(RemoteFolder("s3", (BUCKET,))) as (fs, _):
            fs.mkdir(BUCKET)
        try:
            yield Store(url, environment)
        finally:
            server.stop()
