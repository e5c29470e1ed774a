"""Heads of requests that are too large, or never end, on a real uvicorn."""

import asyncio
import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from fastapi import FastAPI, Request

from server.access import protocol
from server.access.protocol import HEAD_BYTES, GuardedProtocol


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server whose heads must come within half a second."""
    app = FastAPI()

    @app.post("/")
    async def echo(request: Request) -> int:
        return len(await request.body())

    app.add_api_route("/", lambda: "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "HEAD_SECONDS", 0.5)
        config = uvicorn.Config(app, http=GuardedProtocol, log_level="error", timeout_keep_alive=2, port=0)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        thread.join()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def answer(connection: socket.socket) -> bytes:
    """What the server sends until it closes, or until one whole answer with a short body is there."""
    data = b""
    while not data.partition(b"\r\n\r\n")[2]:
        try:
            part = connection.recv(65536)
        except ConnectionError:
            break
        if not part:
            break
        data += part
    return data


def exchange(port: int, request: bytes) -> bytes:
    with connect(port) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request)
        return answer(connection)


@pytest.mark.parametrize("size", [0, 1000, HEAD_BYTES - 200])
def test_heads_within_the_limit_pass(port: int, size: int) -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * size + b"\r\n\r\n"
    assert exchange(port, head).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * (HEAD_BYTES + 1) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 3_000_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: a\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * (2 * HEAD_BYTES) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["just over", "large", "many", "path"],
)
def test_heads_beyond_it_are_refused(port: int, head: bytes) -> None:
    reply = exchange(port, head)
    # Where the rest of the head was still being sent, the closed connection is all that the client sees.
    assert not reply or reply.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))


def test_a_very_long_head_costs_little(port: int) -> None:
    began, sent = time.monotonic(), 0
    with connect(port) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ")
        while sent < 120_000_000:
            connection.sendall(b"a" * 100_000)
            sent += 100_000
    assert sent < 20_000_000
    assert time.monotonic() - began < 5
    assert exchange(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_connections_that_say_nothing_are_closed(port: int) -> None:
    connections = [connect(port) for _ in range(100)]
    began = time.monotonic()
    for i, connection in enumerate(connections):
        connection.sendall(b"GET / HTTP/1.1\r\nX-A: "[: i % 23])
    for connection in connections:
        assert answer(connection) == b""
        connection.close()
    assert time.monotonic() - began < 5


def test_a_connection_may_rest_between_requests(port: int) -> None:
    with connect(port) as connection:
        for _ in range(3):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer(connection).startswith(b"HTTP/1.1 200")
            time.sleep(0.7)  # longer than a head may take, less than the server keeps a connection
        connection.sendall(b"GET / HT")
        assert answer(connection) == b""


def test_a_slow_body_is_not_the_heads_matter(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        for byte in b"abcd":
            time.sleep(0.3)
            connection.sendall(bytes([byte]))
        assert answer(connection).endswith(b"4")


def test_requests_in_one_piece_and_in_any_pieces(port: int) -> None:
    one = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde"
    draw = random.Random(1)
    for _ in range(20):
        stream, count = one * 3, 3
        with connect(port) as connection:
            while stream:
                size = draw.randint(1, 60)
                connection.sendall(stream[:size])
                stream = stream[size:]
            data = b""
            while data.count(b"HTTP/1.1 200") < count or not data.endswith(b"5"):
                data += connection.recv(65536)
