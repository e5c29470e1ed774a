"""Starts a server as a user would, in a process of its own, and waits until it answers.

Experiments, measurements and tests use it.
"""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import httpx

from qsharp_core.errors import QSharpError


class ServingError(QSharpError):
    """The server did not come up."""


@contextmanager
def serve(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    command: Sequence[str] = ("qsharp", "serve"),
    patience: float = 300.0,
    stop: threading.Event | None = None,
    grace: float = 30.0,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> Iterator[str]:
    """Runs `qsharp serve ARGUMENTS` on a loopback port, yields its base URL, and stops it at the end.

    Args:
        arguments: the model and flags.
        log: the file that the server's output goes to.
        environment: variables that the server has beside this process's.
        command: what to run instead of `qsharp serve`.
        patience: seconds to wait until /health answers.
        stop: once it is set, the server is not waited for any longer.
        grace: seconds that the server has to end by itself.
        host: the address that it listens on.
        port: the port; None is a free one.

    Raises:
        ServingError: it ended or did not answer; with the end of its output.
    """
    port = port or free_port(host)
    program, *rest = command
    program = str(Path(sys.executable).parent / program)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, *rest, *arguments, "--host", host, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        url = f"http://{host}:{port}"
        try:
            _wait(process, url, log, patience, stop or threading.Event())
            yield url
        finally:
            process.terminate()
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


@asynccontextmanager
async def serving(arguments: Sequence[str], log: Path, patience: float = 300.0) -> AsyncIterator[str]:
    """`serve` for coroutines. A coroutine that is cancelled while the server starts stops the server at once.

    Raises:
        ServingError
    """
    stop = threading.Event()
    with ExitStack() as stack:
        server = serve(arguments, log, patience=patience, stop=stop)
        starting = asyncio.create_task(asyncio.to_thread(stack.enter_context, server))
        try:
            yield await asyncio.shield(starting)
        finally:
            stop.set()
            with suppress(ServingError):  # told above, unless nobody waits for it any more
                await starting


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, patience: float, stop: threading.Event) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and not stop.is_set():
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    tail = log.read_bytes()[-4000:].decode(errors="replace")
    raise ServingError(f"the server did not come up (exit status {process.poll()}); its output ends:\n{tail}")
