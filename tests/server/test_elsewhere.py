"""Bodies of other routes that sample: private arguments, misplaced fields, and what is passed on as it came."""

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from server.access.gate import Gate, Policy
from server.access.keys import KeyRing
from server.access.quotas import Quotas
from server.api.elsewhere import GuideElsewhere
from server.request.slots import Slots
from server.settings import Settings
from server.state import QSharpState


def app() -> Gate:
    made = FastAPI()
    made.add_middleware(GuideElsewhere)
    unused: Any = None
    critics: Any = SimpleNamespace(workers=SimpleNamespace(stopping=False))
    made.state.qsharp = QSharpState(Settings(), critics, unused, unused, unused, 0, slots=Slots(10))

    @made.post("/{path:path}")
    async def echo(path: str, request: Request) -> Any:
        return {"length": len(await request.body())}

    policy = Policy(keys=KeyRing(["user"], "boss"), quotas=Quotas(), max_body=10**6)
    return Gate(made, made, policy)


def post(path: str, content: bytes, kind: str = "application/json") -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(
                path, content=content, headers={"content-type": kind, "authorization": "Bearer boss"}
            )

    import asyncio

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/generative_scoring", b'{"input": "x", "eta": 0.1}', "eta"),
        ("/v1/systemone", b'{"guidance": {}}', "guidance"),
        ("/v1/messages", b'{"store": true}', "store"),
        ("/v1/chat/completions/batch", b'{"store": true}', "store"),
        ("/v1/responses", b'{"vllm_xargs": {"qsharp_eta": 0.1}}', "vllm_xargs"),
        ("/v1/messages", b'{"vllm_xargs": {"qs\\u0068arp_eta": 0.1}}', "vllm_xargs"),
        ("/inference/v1/generate", b'{"sampling_params": {"extra_args": {"qsharp_id": 7}}}', "extra_args"),
        ("/v1/responses", b'{"eta": "x"}', "eta"),
        ("/v1/responses", b'{"eta": 0}', "eta"),
        ("/v1/messages", b'{"eta": 0.1, "guidance": {"tail": "none"}}', "guidance.tail"),
        ("/v1/messages", b'{"eta": 0.1, "guidance": {"what": 1}}', "guidance.what"),
    ],
)
def test_refused(path: str, body: bytes, param: str) -> None:
    response = post(path, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"eta": 0.1}'),
        ("/v1/chat/completions", b'{"eta": 0.1}'),
        ("/v1/critics/a/score", b'{"eta": 0.1}'),
        ("/tokenize", b'{"eta": 0.1}'),
        ("/v1/chat/completions/render", b'{"eta": 0.1}'),
        ("/generative_scoring", b'{"eta": null}'),
        ("/v1/responses", b'{"input": "the word \\"eta\\" in a text"}'),
        ("/v1/responses", b'{"broken "eta"'),
        ("/v1/responses", b'["eta"]'),
        ("/v1/responses", b"x" * 300_000),
    ],
)
def test_passed_on_whole(path: str, body: bytes) -> None:
    assert post(path, body).json() == {"length": len(body)}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["eta", r"\u0065ta", r"e\u0074\u0061"])
@pytest.mark.parametrize("kind", ["application/json", "application/JSON", "text/plain", "application/x-json"])
def test_however_the_name_is_written(encoding: str, name: str, kind: str) -> None:
    body = f'{{"{name}": 0.1, "input": "x"}}'.encode(encoding)
    assert json.loads(body) == {"eta": 0.1, "input": "x"}
    response = post("/generative_scoring", body, kind)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "eta"


def test_a_body_that_is_nested_too_deeply_is_left_to_the_route() -> None:
    body = b'{"eta": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    assert post("/v1/responses", body).json() == {"length": len(body)}


def test_routes_that_sample_nothing_are_not_looked_at() -> None:
    assert post("/v1/audio/transcriptions", b'{"eta": 1}', "multipart/form-data").status_code == 200
