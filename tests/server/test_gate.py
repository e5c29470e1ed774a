"""The gate in front of the app: every route of the real one, for everybody; and its limits, one by one."""

import asyncio
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.routing import Mount
from vllm.entrypoints.launchers.app import build_app

from server import launch
from server.access import gate as gate_module
from server.access.gate import Gate, Policy
from server.access.keys import KeyRing
from server.access.principal import principal_of
from server.access.quotas import Quotas
from server.access.routes import RULES, Access, rule_of
from server.commands import serve

USER, ADMIN = {"Authorization": "Bearer user"}, {"Authorization": "Bearer boss"}
POLICY = Policy(keys=KeyRing(["user"], "boss"), quotas=Quotas(), max_body=1000)


@pytest.fixture(scope="module")
def vllm_app() -> Iterator[FastAPI]:
    """vLLM's app with all routes that a server for text has, and ours; no engine behind it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("QSHARP_")]:
            patch.delenv(name)
        patch.delenv("VLLM_PLUGINS", raising=False)
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        launch.allow_plugin()
        args = serve.parse(["model", "--api-key", "user", "--admin-key", "boss", "--enable-scale-out", "--playground"])
        yield build_app(args, ("generate",), None)


def operations(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Every method and path of the app; mounted apps as one."""
    for route in app.router.routes:
        path = getattr(route, "path", None)
        assert path is not None, f"{route} has no path"
        for method in getattr(route, "methods", None) or ["GET"]:
            yield method, path


def send(app: Any, method: str, url: str, **fields: Any) -> httpx.Response:
    async def call() -> httpx.Response:
        # An app without an engine fails inside most routes: here only who comes so far matters.
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, url, **fields)

    return asyncio.run(call())


def test_every_route_is_known(vllm_app: FastAPI) -> None:
    assert {path for _, path in operations(vllm_app)} - RULES.keys() == set()


def test_rules_are_of_routes_that_are_there(vllm_app: FastAPI) -> None:
    assert RULES.keys() - {path for _, path in operations(vllm_app)} == set()


def test_every_route_for_nobody_a_user_and_the_admin(vllm_app: FastAPI) -> None:
    seen = set()
    for method, path in operations(vllm_app):
        url = path.replace("{name}", "n").replace("{version}", "1").replace("{rollout_id}", "r")
        url = url.replace("{rest}", "x").replace("{response_id}", "resp_x")
        assert "{" not in url
        nobody, wrong, user, admin = (
            send(vllm_app, method, url, headers=headers).status_code
            for headers in ({}, {"Authorization": "Bearer other"}, USER, ADMIN)
        )
        access = rule_of(path, method).access
        expected = {
            Access.OPEN: (False, False, False, False),
            Access.METRICS: (401, 401, False, False),
            Access.DOCS: (401, 401, False, False),
            Access.USER: (401, 401, False, False),
            Access.ADMIN: (401, 401, 403, False),
            Access.CLOSED: (404, 404, 404, 404),
        }[access]
        for got, want in zip((nobody, wrong, user, admin), expected, strict=True):
            assert got == want if want else got not in (401, 403), (method, path, access, got)
        seen.add(access)
    assert seen == set(Access)


@pytest.mark.parametrize("path", ["/sleep", "/collective_rpc", "/v1/load_lora_adapter", "/new/{x}"])
def test_a_route_that_is_not_listed_is_the_admins(path: str) -> None:
    app = FastAPI()
    app.add_api_route(path, lambda: "done", methods=["POST"])
    guarded = Gate(app, app, POLICY)
    url = path.replace("{x}", "y")
    assert send(guarded, "POST", url).status_code == 401
    assert send(guarded, "POST", url, headers=USER).status_code == 403
    assert send(guarded, "POST", url, headers=ADMIN).status_code == 200
    mounting = FastAPI()
    mounting.router.routes.append(Mount("/inside", app))
    assert send(Gate(mounting, mounting, POLICY), "POST", f"/inside{url}", headers=USER).status_code == 403


def test_what_no_route_takes_needs_a_key_and_is_then_not_found() -> None:
    app = FastAPI()
    guarded = Gate(app, app, POLICY)
    assert send(guarded, "GET", "/nothing").status_code == 401
    assert send(guarded, "GET", "/nothing", headers=USER).status_code == 404


def echoing(**changes: Any) -> Gate:
    """A gate before an app that says who sent what."""
    app = FastAPI()

    @app.api_route("/v1/completions", methods=["GET", "POST"])
    async def echo(request: Request) -> dict[str, Any]:
        body = await request.body()
        return {"who": principal_of(request).name, "length": len(body), "id": request.headers.get("x-request-id")}

    app.add_api_route("/metrics", lambda: "numbers")
    app.add_api_route("/health", lambda: "well")
    return Gate(app, app, replace(POLICY, **changes))


def test_who_sent_it_is_told_to_the_route() -> None:
    assert send(echoing(), "GET", "/v1/completions", headers=USER).json()["who"] == "default"
    assert send(echoing(), "GET", "/v1/completions", headers=ADMIN).json()["who"] == "admin"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic user", "user", "Bearer  user", "Bearer user x"])
def test_headers_that_carry_no_key(header: str) -> None:
    response = send(echoing(), "GET", "/v1/completions", headers={"Authorization": header})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"].keys() >= {"message", "type", "param", "code"}


def test_some_routes_can_be_opened() -> None:
    assert send(echoing(), "GET", "/metrics").status_code == 401
    assert send(echoing(open=("metrics",)), "GET", "/metrics").status_code == 200
    assert send(echoing(), "GET", "/health").status_code == 200


def test_ids_that_clients_send_are_dropped() -> None:
    headers = {**USER, "X-Request-Id": "mine"}
    assert send(echoing(), "GET", "/v1/completions", headers=headers).json()["id"] is None


def test_without_users_keys_anybody_on_this_host_is_a_user() -> None:
    keyless = echoing(keys=KeyRing((), "boss"), hosts={"localhost", "127.0.0.1"})
    assert send(keyless, "GET", "/v1/completions").json()["who"] == "default"
    # The OpenAI clients send some key always.
    assert send(keyless, "GET", "/v1/completions", headers={"Authorization": "Bearer EMPTY"}).json()["who"] == "default"
    assert send(keyless, "GET", "/v1/completions", headers=ADMIN).json()["who"] == "admin"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://localhost"}, 200),
        ({"Origin": "http://localhost:8000", "Host": "localhost:8000"}, 200),
        ({"Origin": "http://friend.example"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Origin": "http://evil.example", "Content-Type": "text/plain"}, 403),
        ({"Host": "evil.example"}, 403),  # a name that its owner has pointed to this host
        ({"Host": "127.0.0.1:8000"}, 200),
        ({"Host": "[::1]:8000"}, 403),
        ({"Host": "["}, 403),
        ({"Origin": "http://["}, 403),
    ],
)
def test_pages_of_others_cannot_use_a_server_without_keys(headers: dict[str, str], status: int) -> None:
    keyless = echoing(keys=KeyRing(), hosts={"localhost", "127.0.0.1"}, origins=["http://friend.example"])
    assert send(keyless, "POST", "/v1/completions", headers=headers).status_code == status


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5000])
@pytest.mark.parametrize("stated", [True, False])
def test_bodies_are_bounded(size: int, stated: bool) -> None:
    async def pieces() -> Any:
        for start in range(0, size, 300):
            yield b"x" * min(300, size - start)

    response = send(echoing(), "POST", "/v1/completions", headers=USER, content=b"x" * size if stated else pieces())
    if size <= 1000:
        assert response.json()["length"] == size
    else:
        assert response.status_code == 413
        assert response.headers["connection"] == "close"
        assert "--max-body-mib" in response.json()["error"]["message"]


def test_a_stated_length_is_refused_before_the_key_is_looked_at() -> None:
    assert send(echoing(), "POST", "/v1/completions", content=b"x" * 1001).status_code == 413


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "IDLE_SECONDS", 0.2)

    async def pieces() -> Any:
        yield b"x"
        await asyncio.sleep(5)
        yield b"x"

    response = send(echoing(), "POST", "/v1/completions", headers=USER, content=pieces())
    assert response.status_code == 408


def test_requests_of_a_time_are_counted_for_each_holder() -> None:
    guarded = echoing(quotas=Quotas("3/minute"))
    statuses = [send(guarded, "GET", "/v1/completions", headers=USER).status_code for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    refused = send(guarded, "GET", "/v1/completions", headers=USER)
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert send(guarded, "GET", "/v1/completions", headers=ADMIN).status_code == 200


def test_requests_at_once_are_counted_for_each_holder() -> None:
    app, entered, leave = FastAPI(), asyncio.Event(), asyncio.Event()

    @app.get("/v1/completions")
    async def wait() -> str:
        entered.set()
        await leave.wait()
        return "done"

    guarded = Gate(app, app, replace(POLICY, quotas=Quotas(concurrent=1)))

    async def main() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://localhost") as client:
            first = asyncio.create_task(client.get("/v1/completions", headers=USER))
            await entered.wait()
            second = await client.get("/v1/completions", headers=USER)
            other = asyncio.create_task(client.get("/v1/completions", headers=ADMIN))
            await asyncio.sleep(0.05)
            leave.set()
            third = await first, await other, await client.get("/v1/completions", headers=USER)
            return [second.status_code, *(response.status_code for response in third)]

    assert asyncio.run(main()) == [429, 200, 200, 200]


def test_the_docs_need_nothing_from_elsewhere(vllm_app: FastAPI) -> None:
    page = send(vllm_app, "GET", "/docs", headers=USER).text
    assert "<title>qsharp-serve" in page
    assert "://" not in re.sub(r"window\.location\.origin \+", "", page)
    needed = re.findall(r'(?:src|href)="(/[^"]+)"', page)
    assert len(needed) == 2
    for path in needed:
        answer = send(vllm_app, "GET", path, headers=USER)
        assert answer.status_code == 200
        assert len(answer.content) > 10_000
    about = send(vllm_app, "GET", "/openapi.json", headers=USER).json()
    assert about["info"]["title"] == "qsharp-serve"
    assert "eta" in str(about["components"]["schemas"]["GuidedCompletionRequest"])
    assert send(vllm_app, "GET", "/redoc", headers=ADMIN).status_code == 404
