"""Attempts to stall a running server, or to guide past its front end; through all of them it serves others."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.conftest import ADMIN_KEY, Server

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
MIB = 2**20


@contextmanager
def healthy(url: str, most: float = 1.0) -> Iterator[None]:
    """Asks `/health` all the time, and fails if an answer takes longer than `most` seconds."""
    delays: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=60) as http:
            while not (stop.is_set() and delays):
                began = time.monotonic()
                assert http.get(f"{url}/health").status_code == 200
                delays.append(time.monotonic() - began)
                time.sleep(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert max(delays) < most


def text_bodies(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Requests that have a text tokenised, by what they are."""
    chat = [{"role": "user", "content": text}]
    return {
        "completion": ("/v1/completions", {"prompt": text, "max_tokens": 1}),
        "many prompts": ("/v1/completions", {"prompt": [text[:1000]] * (len(text) // 1000), "max_tokens": 1}),
        "chat": ("/v1/chat/completions", {"messages": chat, "max_tokens": 1}),
        "tokenize": ("/tokenize", {"prompt": text}),
        "tokenize a chat": ("/tokenize", {"messages": chat}),
        "score": ("/v1/critics/plain/score", {"prompt": "x", "completion": text}),
        "score many": ("/v1/critics/plain/score", {"prompt": "x", "completion": [text[:4000]] * (len(text) // 4000)}),
    }


@pytest.mark.parametrize("kind", text_bodies(""))
def test_the_longest_texts_stall_nobody(server: Server, kind: str) -> None:
    path, body = text_bodies("word and " * int(1.9 * MIB / 9))[kind]
    with healthy(server.url), httpx.Client(base_url=server.url, timeout=300) as http:
        time.sleep(0.2)
        assert http.post(path, json=body).status_code in (200, 400, 404)


def test_larger_bodies_are_refused_unread(server: Server) -> None:
    body = json.dumps({"prompt": "x" * 40 * MIB}).encode()
    with healthy(server.url), httpx.Client(base_url=server.url, timeout=60) as http:
        time.sleep(0.2)
        for path in ("/v1/completions", "/tokenize", "/v1/critics/plain/score", "/v1/rollouts/rewards"):
            with suppress(httpx.WriteError, httpx.ReadError):  # the server closes while this is still sending
                assert http.post(path, content=body, headers={"Content-Type": "application/json"}).status_code == 413


def test_a_connection_is_kept_for_longer_than_clients_keep_it(server: Server) -> None:
    """httpx gives up connections after five seconds, which was how long the server kept them."""
    connection = http.client.HTTPConnection(httpx.URL(server.url).host, httpx.URL(server.url).port, timeout=30)
    for pause in (0, 7):
        time.sleep(pause)
        connection.request("GET", "/version")
        assert connection.getresponse().read()
    connection.close()


def test_slow_and_endless_connections_stall_nobody(server: Server) -> None:
    address = (urlsplit(server.url).hostname, urlsplit(server.url).port)
    connections = []
    with healthy(server.url):
        for i in range(400):
            connection = socket.create_connection(address, timeout=10)
            connection.sendall((b"", b"GET /he", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: ")[i % 3])
            connections.append(connection)
        time.sleep(0.5)
        with socket.create_connection(address, timeout=10) as endless, suppress(ConnectionError):
            endless.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
            for _ in range(1200):
                endless.sendall(b"a" * 100_000)
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("depth", [500, 20_000, 400_000])
@pytest.mark.parametrize("bracket", ["[]", "{}"])
def test_deep_nesting_is_a_clients_error(server: Server, depth: int, bracket: str) -> None:
    openers, closers = ('{"a":' * depth, "}" * depth) if bracket == "{}" else ("[" * depth, "]" * depth)
    whole = openers + ("1" if bracket == "{}" else "") + closers
    routes = [
        "/v1/completions", "/v1/chat/completions", "/v1/critics/plain/score", "/v1/critics", "/v1/rollouts/rewards",
        "/v1/rollouts/x/reward", "/tokenize", "/detokenize", "/v1/responses", "/v1/messages",
        "/v1/chat/completions/batch", "/v1/chat/completions/chatcmpl-x", "/generative_scoring",
        "/v1/critics/plain/activate",
    ]  # fmt: skip
    with healthy(server.url, 2.0), httpx.Client(base_url=server.url, timeout=60, headers=ADMIN) as http:
        for path in routes:
            for body in (whole, f'{{"prompt": "x", "metadata": {whole}}}', f'{{"items": {whole}}}'):
                response = http.post(path, content=body, headers={"Content-Type": "application/json"})
                assert response.status_code < 500, (path, response.status_code, response.text[:300])


ESCAPED = r"qs\u0068arp_eta"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["application/json", "application/JSON", "application/json; charset=utf-16"])
@pytest.mark.parametrize("name", ["qsharp_eta", ESCAPED])
def test_private_arguments_are_refused_or_without_effect(server: Server, encoding: str, kind: str, name: str) -> None:
    plain = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    smuggled = json.dumps({**plain, "vllm_xargs": {"NAME": 1e-6, "qsharp_critic": "nobody"}}).replace("NAME", name)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        expected = http.post("/v1/completions", json=plain).json()["choices"][0]["text"]
        for path in ("/v1/completions", "/invocations", "/inference/v1/generate", "/v1/responses"):
            response = http.post(path, content=smuggled.encode(encoding), headers={"Content-Type": kind})
            if response.status_code == 200:
                assert response.json()["choices"][0]["text"] == expected
            else:
                assert 400 <= response.status_code < 500


def test_clients_do_not_name_responses(server: Server) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 1, "request_id": "mine"}
    with httpx.Client(base_url=server.url, timeout=60, headers={"X-Request-Id": "mine"}) as http:
        first, second = (http.post("/v1/completions", json=body).json()["id"] for _ in range(2))
    assert first != second
    assert "mine" not in first + second
