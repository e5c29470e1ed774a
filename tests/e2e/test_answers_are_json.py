"""Whatever is asked, the answer is JSON: no NaN, no infinity; and an error has OpenAI's shape, on every route."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from server.access.routes import RULES, Access, Rule
from tests.conftest import ADMIN_KEY, Server

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
ONLY_END = {"allowed_token_ids": [1], "min_tokens": 3}
# The grammar wants a digit, and only letters are allowed: which token is left nobody can tell beforehand.
NO_DIGIT = {"structured_outputs": {"choice": ["1", "2"]}, "allowed_token_ids": [60, 61, 62]}
# Of another protocol: its clients expect that protocol's errors.
ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/render")
OF_VLLM = {"/v1/systemone": 501}  # what this model cannot do
# They change the engine, serve files, or answer the admin's body that is no object with a 500 and a closed connection.
LEFT_OUT = ("/scale_elastic_ep", "/static", "/inference/v1/abort_requests")


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


def strict(text: str) -> Any:
    """JSON's value, of JSON that any parser takes."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} in {text[:500]}")

    return json.loads(text, parse_constant=refuse)


def events(text: str) -> list[Any]:
    return [strict(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]


def stored(http: httpx.Client) -> int:
    return int(http.get("/v1/rollouts/count", headers=ADMIN).json()["count"])


@pytest.mark.parametrize("store", [False, True], ids=["", "stored"])
@pytest.mark.parametrize("eta", [None, 0.1], ids=["plain", "guided"])
@pytest.mark.parametrize("fields", [ONLY_END, {"allowed_token_ids": [60], "bad_words": [chr(32 + 57)]}])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_masks_that_leave_no_token(
    http: httpx.Client, fields: dict[str, Any], eta: float | None, store: bool, stream: bool
) -> None:
    before = stored(http)
    body = {
        "model": "tiny", "prompt": "abc", "max_tokens": 5, "eta": eta, "logprobs": 3, "store": store, "stream": stream,
    }  # fmt: skip
    answer = http.post("/v1/completions", json={**body, **fields})
    error = strict(answer.text)["error"]
    assert (answer.status_code, error["code"]) == (400, 400), answer.text
    assert error["param"] == "allowed_token_ids"
    assert stored(http) == before


@pytest.mark.parametrize("store", [False, True], ids=["", "stored"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_masks_that_leave_no_token_on_the_way(http: httpx.Client, store: bool, stream: bool) -> None:
    before = stored(http)
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "eta": 0.1, "store": store, "stream": stream}
    for detail in ("summary", "tokens"):
        guidance = {"detail": detail, "min_prob": 0}
        answer = http.post("/v1/completions", json={**body, **NO_DIGIT, "guidance": guidance})
        error = (events(answer.text)[-1] if stream else strict(answer.text))["error"]
        assert error["code"] == 400, answer.text
        assert "no token was left" in error["message"]
    assert stored(http) == before
    assert 'reason="no_token"' not in http.get("/metrics").text  # the critic has not failed


def test_masks_that_leave_some(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "min_tokens": 3, "logprobs": 5, "eta": 0.1}
    for more in ({"allowed_token_ids": [1, 60]}, {"allowed_token_ids": [60, 61], "bad_words": [chr(32 + 57)]}):
        for stream in (False, True):
            detail = {"detail": "tokens", "min_prob": 0}
            answer = http.post("/v1/completions", json={**body, **more, "stream": stream, "guidance": detail})
            assert answer.status_code == 200, answer.text
            assert events(answer.text) if stream else strict(answer.text)["choices"]


# -- text that cannot be encoded

HALF = "\ud800"
TEXTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"stop": HALF}),
    ("/v1/completions", {"stop": ["x", HALF]}),
    ("/v1/completions", {"bad_words": [HALF]}),
    ("/v1/completions", {"vllm_xargs": {"a": HALF}}),
    ("/v1/completions", {"vllm_xargs": {HALF: "a"}}),
    ("/v1/completions", {"prompt": HALF}),
    ("/v1/completions", {"prompt": ["a", HALF]}),
    ("/v1/completions", {"suffix": HALF}),
    ("/v1/completions", {"user": HALF}),
    ("/v1/completions", {"model": HALF}),
    ("/v1/completions", {"logit_bias": {HALF: 1}}),
    ("/v1/completions", {"structured_outputs": {"choice": [HALF]}}),
    ("/v1/completions", {"structured_outputs": {"regex": HALF}}),
    ("/v1/completions", {"structured_outputs": {"grammar": HALF}}),
    ("/v1/completions", {"structured_outputs": {"json": {"title": HALF}}}),
    ("/v1/completions", {"response_format": {"type": HALF}}),
    ("/v1/completions", {"metadata": {"a": HALF}, "store": True}),
    ("/v1/completions", {"guidance": {"critic": HALF}, "eta": 0.1}),
    ("/v1/completions", {"cache_salt": HALF}),
    ("/v1/completions", {"request_id": HALF}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
    ("/v1/chat/completions", {"messages": [{"role": HALF, "content": "a"}]}),
    ("/v1/chat/completions", {"stop": [HALF]}),
    ("/v1/chat/completions", {"bad_words": [HALF]}),
    ("/v1/chat/completions", {"vllm_xargs": {"a": HALF}}),
    ("/v1/chat/completions", {"chat_template_kwargs": {"a": HALF}}),
    ("/v1/chat/completions", {"chat_template": HALF}),
    ("/v1/chat/completions", {"reasoning_effort": HALF}),
    ("/v1/chat/completions", {"tools": [{"type": "function", "function": {"name": HALF}}]}),
    ("/v1/chat/completions/batch", {"stop": [HALF], "messages": [[{"role": "user", "content": "a"}]]}),
    ("/v1/responses", {"input": HALF}),
    ("/v1/responses", {"instructions": HALF}),
    ("/v1/responses", {"metadata": {"a": HALF}}),
    ("/v1/messages", {"system": HALF}),
    ("/v1/messages", {"stop_sequences": [HALF]}),
    ("/inference/v1/generate", {"sampling_params": {"stop": [HALF], "max_tokens": 2}}),
    ("/inference/v1/generate", {"sampling_params": {"extra_args": {"a": HALF}, "max_tokens": 2}}),
    ("/tokenize", {"prompt": HALF}),
]
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/chat/completions/batch": {"max_tokens": 2},
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/inference/v1/generate": {"token_ids": [5]},
    "/tokenize": {},
}


@pytest.mark.parametrize(("path", "fields"), TEXTS, ids=lambda value: str(value).encode("unicode_escape").decode()[:60])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_half_a_character_is_no_fault_of_the_servers(
    other: str, path: str, fields: dict[str, Any], stream: bool
) -> None:
    body = {"model": "tiny", **VALID[path], **fields, **({"stream": True} if stream else {})}
    content = json.dumps(body).encode()  # escaped, as a client may send it
    answer = httpx.post(other + path, content=content, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == 400, answer.text
    of_an_error(answer, path)
    assert answer.json()["error"]["param"].split(".")[0].split("[")[0] == next(iter(fields))


# -- the shape of errors


def of_an_error(answer: httpx.Response, path: str) -> None:
    body = strict(answer.text)
    error = body["error"]
    assert error["message"]
    assert error["type"]
    if path not in ANTHROPIC:
        assert {"message", "type", "param", "code"} <= error.keys(), body
        assert error["code"] == answer.status_code, body


def methods_of(rule: Any) -> tuple[str, ...]:
    return tuple(rule) if isinstance(rule, Mapping) else ("GET", "POST", "DELETE", "PATCH")


@pytest.mark.parametrize("path", [*RULES, "/nothing", "/v1/nothing", "/v1/critics/a/b/c"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"model": 5}', b"\xff\xfe", b'"a"', b'{"eta": NaN}'])
def test_errors_have_openais_shape_on_every_route(other: str, path: str, content: bytes) -> None:
    rule = RULES.get(path)
    if isinstance(rule, Rule) and (rule.access is Access.DOCS or path in LEFT_OUT):
        pytest.skip("no route of an API")
    concrete = re.sub(r"\{[^}]*\}", "nobody", path)
    with httpx.Client(base_url=other, timeout=60, headers={**ADMIN, "Content-Type": "application/json"}) as http:
        for method in methods_of(rule):
            answer = http.request(method, concrete, content=content)
            if answer.status_code == OF_VLLM.get(path):
                continue
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                of_an_error(answer, path)
