"""Guidance on vLLM's other routes; and a server that guides by default never samples unguided unasked."""

import json
from typing import Any

import httpx
import pytest

from server.access.routes import RULES
from server.api.completions import PATHS
from server.api.elsewhere import GUIDED, SCORING
from tests.conftest import Server
from tests.e2e.conftest import DEFAULT_ETA

CHAT = [{"role": "user", "content": "abc"}]
LENGTH = {"max_tokens": 6, "temperature": 0}
# A request to each route that samples, and where its text is.
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "abc", **LENGTH},
    "/v1/chat/completions": {"messages": CHAT, **LENGTH},
    "/v1/chat/completions/batch": {"messages": [CHAT, CHAT], **LENGTH},
    "/v1/responses": {"input": "abc", "max_output_tokens": 6, "temperature": 0},
    "/v1/messages": {"messages": CHAT, **LENGTH},
    "/inference/v1/generate": {"token_ids": [5, 6, 7], "sampling_params": LENGTH},
}
# Routes that sample nothing, or ask how likely something is.
OTHERS = {
    "/health", "/liveness", "/version", "/metrics", "/docs", "/docs/oauth2-redirect", "/openapi.json",
    "/static", "/load", "/v1/models", "/tokenize", "/detokenize", "/v1/messages/count_tokens", "/invocations", "/ping",
    "/scale_elastic_ep", "/is_scaling_elastic_ep", "/kv_event_sources", "/inference/v1/abort_requests",
    "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel", "/", "/playground", *SCORING,
}  # fmt: skip
PREFIXES = ("/v1/critics", "/v1/rollouts", "/v1/chat/completions/chatcmpl-")


def reports(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Every `guidance` of a response."""
    choices = payload.get("choices") or [payload]
    return [choice["guidance"] for choice in choices if "guidance" in choice]


def test_every_route_that_may_sample_is_here() -> None:
    unknown = {
        path
        for path in RULES
        if path not in OTHERS and not path.startswith(PREFIXES) and not path.endswith(("/render", "/derender"))
    }
    assert unknown == REQUESTS.keys() == {*PATHS, *GUIDED}


@pytest.mark.parametrize("path", REQUESTS)
def test_a_default_eta_holds_on_every_route(other: str, path: str) -> None:
    with httpx.Client(base_url=other, timeout=120) as http:
        for fields, eta in (({}, DEFAULT_ETA), ({"eta": 0.5}, 0.5)):
            response = http.post(path, json={"model": "tiny", **REQUESTS[path], **fields})
            assert response.status_code == 200, response.text
            found = reports(response.json())
            assert found, response.text
            assert all(one["eta"] == eta and one["tokens_guided"] > 0 for one in found)
        response = http.post(path, json={"model": "tiny", **REQUESTS[path], "eta": None})
        assert response.status_code == 200, response.text
        assert all(one["eta"] is None for one in reports(response.json()))


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_streams_report_on_their_last_event(other: str, path: str) -> None:
    with httpx.Client(base_url=other, timeout=120) as http:
        body = {"model": "tiny", **REQUESTS[path], "stream": True, "eta": 0.2}
        events = [
            json.loads(line.removeprefix("data: "))
            for line in http.post(path, json=body).text.splitlines()
            if line.startswith("data: {")
        ]
    found = [
        inner["guidance"] for event in events for inner in (event, event.get("response") or {}) if "guidance" in inner
    ]
    assert [one["eta"] for one in found] == [0.2]


@pytest.mark.parametrize("path", GUIDED)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"eta": 0}, "eta"),
        ({"eta": 0.1, "guidance": {"critic": "nobody"}}, "guidance.critic"),
        ({"eta": 0.1, "guidance": {"candidates": 10_000}}, "guidance.candidates"),
        ({"guidance": {"nothing": 1}}, "guidance.nothing"),
    ],
)
def test_wrong_values_are_named_on_every_route(other: str, path: str, fields: dict[str, Any], param: str) -> None:
    response = httpx.post(other + path, json={"model": "tiny", **REQUESTS[path], **fields}, timeout=60)
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["param"] == param


def test_what_samples_nothing_needs_no_guidance(other: str) -> None:
    with httpx.Client(base_url=other, timeout=60) as http:
        for fields in (
            {"max_tokens": 0, "echo": True, "logprobs": 1},
            {"use_beam_search": True, "n": 2, "max_tokens": 3},
        ):
            response = http.post("/v1/completions", json={"model": "tiny", "prompt": "abc", **fields})
            assert response.status_code == 200, response.text
            assert all("guidance" not in choice for choice in response.json()["choices"])
        response = http.post(
            "/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 0, "echo": True, "eta": 1}
        )
        assert response.json()["error"]["param"] == "max_tokens"


@pytest.mark.parametrize("fields", [{"extra_body": {"eta": 0.1}}, {"extra_body": {"guidance": {}, "x": 1}}])
def test_a_literal_extra_body_is_refused(server: Server, fields: dict[str, Any]) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a", **fields}, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("extra_body.")


def test_a_trailing_slash_leads_to_the_route(server: Server) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "eta": 0.1}
    response = httpx.post(f"{server.url}/v1/completions/", json=body, timeout=60, follow_redirects=True)
    assert response.status_code == 200
    assert response.json()["choices"][0]["guidance"]["eta"] == 0.1
