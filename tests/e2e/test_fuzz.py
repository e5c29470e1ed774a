"""Requests made at random: whatever is sent, the answer is no 5xx of ours, and the server goes on.

    QSHARP_FUZZ_SECONDS=1200 pytest tests/e2e/test_fuzz.py     # longer than the minute and a half of `make test`

Two ways: schemathesis, from the description that the server gives of itself; and valid requests of ours in which some
values are replaced by odd ones. Each run draws anew, and a failure names its seed.
"""

import copy
import io
import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import HypothesisException
from schemathesis.core.result import Ok

from tests.conftest import ADMIN_KEY

SECONDS = float(os.environ.get("QSHARP_FUZZ_SECONDS", "90"))
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
CLIENTS = 4  # at once, with odd values
# vLLM's own: 501 of what this model cannot do, and messages of assistants that it does not read whole.
OF_RESPONSES = (
    (500, "'ResponseOutputRefusal' object has no attribute 'text'"),
    (500, "list index out of range"),  # a message without content
)
NOT_OURS = {
    "/v1/systemone": ((501, ""),),
    "/v1/responses": OF_RESPONSES,
    "/v1/responses/render": OF_RESPONSES,
}
# They change the engine, wait for what never comes, or take a file, of which schemathesis can make none.
LEFT_OUT = (
    "/scale_elastic_ep", "/is_scaling_elastic_ep", "/v1/responses/{response_id}", "/inference/v1/abort_requests",
    "/v1/rollouts/import",
)  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), "", " ", "\x00", "\ud800", "x" * 10_000, "漢" * 100, "../../etc/passwd", "a@b", "1e999", "null",
    "'; DROP TABLE rollouts; --", [], [[]], [None], [1, "a"], list(range(300)), {}, {"": ""},
    {"a": {"b": [1, {"c": None}]}},
    ["x"] * 300, {str(i): "x" for i in range(300)},
]  # fmt: skip


def alive(http: httpx.Client) -> bool:
    answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 2})
    return answer.status_code == 200 and http.get("/liveness").status_code == 200


def wrong(path: str, response: Any) -> bool:
    known = any(response.status_code == status and words in response.text for status, words in NOT_OURS.get(path, ()))
    return response.status_code >= 500 and not known


@pytest.mark.timeout(int(SECONDS) + 300)
@pytest.mark.parametrize("key", [{}, ADMIN], ids=["user", "admin"])
def test_what_the_description_allows(other: str, key: dict[str, str]) -> None:
    schema = schemathesis.openapi.from_url(f"{other}/openapi.json", headers=ADMIN)
    operations = [o.ok() for o in schema.get_all_operations() if isinstance(o, Ok) and o.ok().path not in LEFT_OUT]
    assert {"/v1/rollouts/rewards", "/v1/critics/{name}/score", "/v1/completions"} <= {o.path for o in operations}
    until, found, sent = time.monotonic() + SECONDS / 4, [], 0
    draw = random.Random()
    with httpx.Client(base_url=other, timeout=60) as http:
        while time.monotonic() < until:
            operation = draw.choice(operations)

            @given(case=operation.as_strategy())
            @settings(
                max_examples=5, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )  # fmt: skip
            def run(case: Any) -> None:
                nonlocal sent
                sent += 1
                response = case.call(headers=key, timeout=60)
                if wrong(case.operation.path, response):
                    found.append((response.status_code, case.as_curl_command(), response.text[:300]))

            try:
                run()
            except HypothesisException as error:  # no example can be made of this one
                print(operation.label, error)
        assert alive(http)
    print(f"{sent} requests")
    assert sent > SECONDS / 10
    assert found == []


def rollouts_file(http: httpx.Client) -> bytes:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "n": 4, "store": True, "eta": 0.1}
    assert http.post("/v1/completions", json=body).status_code == 200
    return http.get("/v1/rollouts/export", headers=ADMIN).content


def seeds(http: httpx.Client) -> list[tuple[str, str, Any]]:
    """Valid requests: method, path, body."""
    stored = {
        "model": "tiny",
        "prompt": "abc",
        "max_tokens": 4,
        "n": 2,
        "store": True,
        "metadata": {"a": "b"},
        "seed": 3,
    }
    answer = http.post("/v1/completions", json=stored).json()
    rollout = answer["choices"][0]["rollout_id"]
    guidance = {
        "critic": "fast",
        "candidates": 8,
        "min_prob": 0.01,
        "tail": "floor",
        "method": "qsharp",
        "detail": "tokens",
    }
    chat = [{"role": "user", "content": "abc"}]
    return [
        ("POST", "/v1/completions", {**stored, "eta": 0.1, "guidance": guidance, "logprobs": 2, "stop": ["x"]}),
        ("POST", "/v1/completions",
         {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 3, "eta": 0.5, "stream": True}),
        ("POST", "/v1/completions",
         {"model": "tiny", "prompt": "abc", "max_tokens": 4, "n": 2, "eta": 0.1, "store": True, "seed": 3,
          "guidance": {"search": {"kind": "best_of", "n": 3, "by": "majority", "reject": {"every": 1, "keep": 0.5}}}}),
        ("POST", "/v1/chat/completions",
         {"model": "tiny", "messages": chat, "max_tokens": 4, "n": 2, "eta": 0.1, "stream": True,
          "guidance": {"search": {"kind": "particles", "n": 3, "every": 2, "resample_below": 0.9, "by": "sample"}}}),
        ("POST", "/v1/responses",
         {"model": "tiny", "input": "abc", "max_output_tokens": 3, "eta": 0.1,
          "guidance": {"search": {"kind": "stop", "below": 0.4}}}),
        ("POST", "/v1/chat/completions",
         {"model": "tiny", "messages": chat, "max_tokens": 4, "eta": 0.1, "store": True}),
        ("POST", "/v1/chat/completions/batch", {"model": "tiny", "messages": [chat, chat], "max_tokens": 3, "eta": 1}),
        ("POST", "/v1/responses", {"model": "tiny", "input": "abc", "max_output_tokens": 3, "eta": 0.1}),
        ("POST", "/v1/messages", {"model": "tiny", "messages": chat, "max_tokens": 3, "eta": 0.1}),
        ("POST", "/inference/v1/generate", {"token_ids": [5, 6], "sampling_params": {"max_tokens": 3}, "eta": 0.1}),
        ("POST", "/v1/critics/fast/score", {"prompt": "ab", "completion": ["c", "de"]}),
        ("POST", "/v1/critics/fast/score", {"prompt": [1, 2], "completion": [3, 4]}),
        ("POST", "/v1/critics", {"path": "/nowhere", "name": "x", "activate": False}),
        ("POST", "/v1/critics/fast/activate", {"version": "1"}),
        ("POST", "/v1/critics/fast/rollback", {}),
        ("POST", "/v1/rollouts/rewards", {"items": [{"id": rollout, "reward": 1.0, "source": "s"}]}),
        ("POST", f"/v1/rollouts/{rollout}/reward", {"reward": 0.5, "source": "s"}),
        ("POST", "/tokenize", {"model": "tiny", "prompt": "abc"}),
        ("POST", "/detokenize", {"model": "tiny", "tokens": [1, 2]}),
        ("GET", "/v1/rollouts", {"critic": "fast", "guided": "true", "limit": "3", "order": "asc", "metadata.a": "b"}),
        ("GET", "/v1/rollouts/count", {"has_reward": "true", "owner": "default"}),
        ("GET", "/v1/chat/completions", {"limit": "3", "metadata[a]": "b", "order": "desc"}),
    ]  # fmt: skip


def mutated(value: Any, draw: random.Random) -> Any:
    """A copy in which a value at a random place is an odd one, is missing, or has another name."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    changed = copy.deepcopy(value)
    visit(changed)
    if not places:
        return draw.choice(ODD)
    holder, key = draw.choice(places)
    what = draw.random()
    if what < 0.8:
        holder[key] = copy.deepcopy(draw.choice(ODD))
    elif what < 0.9 and isinstance(holder, dict):
        holder[draw.choice(["", "\x00", "e" * 5000, "eta ", "__proto__"])] = holder.pop(key)
    else:
        del holder[key]
    return changed


def plain(value: Any) -> bytes:
    return str(value)[:300].encode("utf-8", "replace")  # all of them must fit into a request's line


def encoded(body: Any, draw: random.Random) -> bytes:
    text = json.dumps(body)
    deep = draw.random()
    if deep < 0.02:
        text = text.replace("{", '{"a": ' + "[" * 3000 + "]" * 3000 + ", ", 1)
    if deep > 0.97:
        text = text[: draw.randrange(len(text) + 1)]
    return text.encode(draw.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig"]))


@pytest.mark.timeout(int(SECONDS) + 300)
def test_valid_requests_with_odd_values(other: str) -> None:
    seed, until = random.randrange(2**32), time.monotonic() + SECONDS / 2
    with httpx.Client(base_url=other, timeout=300) as http:
        valid, file = seeds(http), rollouts_file(http)
        assert pq.read_table(io.BytesIO(file)).num_rows > 0

        def client(number: int) -> tuple[int, list[Any]]:
            """How many requests one client sent, and what was wrong."""
            draw, sent, found = random.Random(f"{seed}/{number}"), 0, []
            while time.monotonic() < until:
                method, path, content, response = ask(http, draw, valid, file)
                sent += 1
                if wrong(path, response):
                    found.append((method, path, content[:2000], response.status_code, response.text[:300]))
            return sent, found

        with ThreadPoolExecutor(CLIENTS) as clients:
            results = [*clients.map(client, range(CLIENTS))]
        assert alive(http), f"seed {seed}"
    sent = sum(count for count, _ in results)
    print(f"{sent} requests")
    assert sent > SECONDS / 10
    assert [one for _, found in results for one in found] == [], f"seed {seed}"


def ask(
    http: httpx.Client, draw: random.Random, valid: list[tuple[str, str, Any]], file: bytes
) -> tuple[str, str, bytes, httpx.Response]:
    """Sends a valid request with odd values, or a file of rollouts with some bits turned; what was sent, the answer."""
    key = draw.choice([{}, ADMIN])
    if draw.random() < 0.1:
        data = bytearray(file)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path = "/v1/rollouts/import"
        return "POST", path, bytes(data), http.post(path, content=bytes(data), headers=ADMIN)
    method, path, body = draw.choice(valid)
    for _ in range(draw.randint(1, 3)):
        body = mutated(body, draw)
        if not isinstance(body, dict | list):
            break
    if method == "GET":
        query = {plain(k): plain(v) for k, v in (body.items() if isinstance(body, dict) else [])}
        return method, path, repr(query).encode(), http.get(path, params=query, headers=key)  # type: ignore[arg-type]
    content = encoded(body, draw)
    return method, path, content, http.post(path, content=content, headers={**key, "Content-Type": "application/json"})
