"""Requests to the store's routes that no client of good will sends: each is refused by name, or works. None fails."""

import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from prometheus_client import REGISTRY
from starlette.testclient import TestClient

from qsharp_core.errors import GuidanceError
from qsharp_core.rollouts.records import LARGEST, Rollout
from server import metrics
from server.access.keys import ADMIN
from server.request.admission import admit
from server.request.schema import GuidedCompletionRequest, accepts
from server.settings import Settings
from server.store.filters import Filters
from server.store.rollouts import RolloutStore
from tests.server.conftest import outside
from tests.server.test_store import made, run, unguided
from tests.support.store_server import error_of, serving

CHAT = "/v1/chat/completions/chatcmpl-1"
SQL = ("SELECT", "FROM rollouts", "INSERT", "sqlite", "psycopg")
DEEP = "[" * 20_000 + "]" * 20_000


@pytest.fixture
def one(store: RolloutStore) -> str:
    """The id of a stored rollout."""
    rollout = unguided()
    run(store.add([rollout, made(route="chat", request_id="chatcmpl-1")]))
    return rollout.id


@pytest.fixture
def http(store: RolloutStore, one: str) -> Iterator[TestClient]:
    with serving(store) as served:
        yield served.client(ADMIN)


def refused(answer: Any, param: str | None) -> str:
    """The message of a 400 that names the field, in words that can be shown to anybody."""
    error = error_of(answer, 400)
    message = str(error["message"])
    assert error["param"] == param, error
    assert not any(word in message for word in SQL), message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("levels", [101, 900, 20_000])
def test_bodies_that_are_too_deep(http: TestClient, one: str, levels: int) -> None:
    deep = "[" * levels + "]" * levels
    for path in (f"/v1/rollouts/{one}/reward", "/v1/rollouts/rewards", CHAT):
        for body in (deep, f'{{"items": {deep}}}', f'{{"metadata": {deep}, "reward": {deep}}}'):
            refused(http.post(path, content=body, headers={"Content-Type": "application/json"}), "body")


@pytest.mark.parametrize("odd", ["%00", "a%00b", "%ED%A0%80", "%F0%9F%98%80", "'%22;--", "a" * 5000])
def test_names_that_databases_do_not_take(http: TestClient, one: str, odd: str) -> None:
    for method, path in [
        ("GET", "/v1/rollouts/{}"), ("POST", "/v1/rollouts/{}/reward"), ("GET", "/v1/chat/completions/chatcmpl-{}"),
        ("GET", "/v1/chat/completions/chatcmpl-{}/messages"), ("DELETE", "/v1/chat/completions/chatcmpl-{}"),
        ("POST", "/v1/chat/completions/chatcmpl-{}"),
    ]:  # fmt: skip
        body: dict[str, Any] = {"reward": 1} if path.endswith("reward") else {"metadata": None}
        answer = http.request(method, path.format(odd), json=body if method == "POST" else None)
        assert error_of(answer, 404)["type"] == "NotFoundError"
    for route in ("/v1/rollouts", "/v1/rollouts/count", "/v1/rollouts/export"):
        for name in ("critic", "model", "owner", "rewarded_by", "metadata.a"):
            answer = http.get(f"{route}?{name}={odd}")
            if len(odd) > 1000:
                refused(answer, name.partition(".")[0])
            else:
                assert answer.status_code == 200
        assert http.get(f"{route}?metadata.{odd}=b").status_code == (400 if len(odd) > 1000 else 200)
        refused(http.get(f"{route}?{odd}=1"), unquote(odd).replace("\0", "\ufffd"))
    refused(http.get(f"/v1/rollouts?after={odd}"), "after")
    refused(http.get(f"/v1/chat/completions?after={odd}"), "after")


def test_text_that_cannot_be_encoded(http: TestClient, store: RolloutStore, one: str) -> None:
    json_type = {"Content-Type": "application/json"}

    def post(path: str, body: str) -> Any:
        return http.post(path, content=body, headers=json_type)

    unknown = post("/v1/rollouts/rewards", '{"items": [{"id": "\\ud800\\u0000", "reward": 1}]}')
    refused(unknown, "items[0].id")
    assert unknown.json()["error"]["items"][0]["id"] == "\ufffd\ufffd"
    refused(post("/v1/rollouts/rewards", '{"items": [{"id": NaN, "reward": 1}]}'), "items[0].id")
    refused(post("/v1/rollouts/rewards", '{"items": [{"id": [{"a": 1e999}], "reward": 1}]}'), "items[0].id")
    refused(post("/v1/rollouts/rewards", '{"items": [{"id": "a", "reward": 1, "\\udfff": 1}]}'), "items[0].\ufffd")
    refused(post(f"/v1/rollouts/{one}/reward", '{"reward": 1, "\\ud800": 2}'), "\ufffd")
    refused(post(f"/v1/rollouts/{one}/reward", '{"reward": "\\ud800"}'), "reward")
    refused(post(CHAT, '{"metadata": {"\\ud800": 1}}'), "metadata")
    answer = post(f"/v1/rollouts/{one}/reward", '{"reward": 1, "source": "a\\ud800\\u0000"}')
    assert answer.json()["rewards"][0]["source"] == "a\ufffd\ufffd"
    assert post(CHAT, '{"metadata": {"\\ud800": "\\u0000"}}').json()["metadata"] == {"\ufffd": "\ufffd"}
    for encoding in ("utf-16", "utf-32", "latin-1"):
        content = json.dumps({"reward": 2, "source": "é"}, ensure_ascii=False).encode(encoding)
        answer = http.post(f"/v1/rollouts/{one}/reward", content=content, headers=json_type)
        assert answer.status_code == (400 if encoding == "latin-1" else 200)


def test_many_filters_and_long_ones(http: TestClient) -> None:
    """SQLite's expressions are at most 1,000 deep, and its patterns 50,000 characters long."""
    for route in ("/v1/rollouts", "/v1/rollouts/count", "/v1/rollouts/export", "/v1/chat/completions"):
        for count, status in ((16, 200), (17, 400), (1200, 400)):
            query = "&".join(f"metadata.k{i}=v" for i in range(count))
            answer = http.get(f"{route}?{query}")
            assert answer.status_code == status, answer.text
            if status == 400:
                refused(answer, "metadata")
        refused(http.get(f"{route}?metadata.{'k' * 65}=v"), "metadata")
        refused(http.get(f"{route}?metadata.k={'v' * 513}"), "metadata")
        refused(http.get(f"{route}?model={'m' * 50_000}"), "model")
    for name in ("critic", "owner", "rewarded_by", "after"):
        refused(http.get(f"/v1/rollouts?{name}={'c' * 50_000}"), name)


def test_numbers_beyond_what_sums_hold(http: TestClient, store: RolloutStore, one: str) -> None:
    def total() -> float:
        return sum(
            REGISTRY.get_sample_value("qsharp_rollout_reward_sum", {"guided": g}) or 0 for g in ("true", "false")
        )

    for reward in (1e308, -1e308, 1.1 * LARGEST):
        refused(http.post(f"/v1/rollouts/{one}/reward", json={"reward": reward}), "reward")
        item = {"id": one, "reward": reward}
        refused(http.post("/v1/rollouts/rewards", json={"items": [item]}), "items[0].reward")
    body = '{"reward": %s}' % ("9" * 5000)
    assert http.post(f"/v1/rollouts/{one}/reward", content=body).status_code == 400
    before = total()
    assert http.post(f"/v1/rollouts/{one}/reward", json={"reward": LARGEST}).json()["reward"] == LARGEST
    assert total() - before == LARGEST


@pytest.mark.parametrize(
    "metadata",
    [
        {str(i): "x" for i in range(100_000)}, {str(i): "x" for i in range(17)}, {"k" * 65: "x"}, {"k": "x" * 513},
        {"k": 1}, {"k": None}, [], "x",
    ],
)  # fmt: skip
def test_metadata_have_openais_limits(http: TestClient, metadata: Any) -> None:
    refused(http.post(CHAT, json={"metadata": metadata}), "metadata")
    most = {f"{'k' * 62}{i:02}": "é" * 512 for i in range(16)}
    assert http.post(CHAT, json={"metadata": most}).json()["metadata"] == most


def test_a_source_has_a_limit(http: TestClient, one: str) -> None:
    assert http.post(f"/v1/rollouts/{one}/reward", json={"reward": 1, "source": "s" * 512}).status_code == 200
    refused(http.post(f"/v1/rollouts/{one}/reward", json={"reward": 1, "source": "s" * 513}), "source")


@pytest.mark.parametrize(("seed", "n", "right"), [(2**63 - 1, 1, True), (2**63 - 2, 2, True), (2**63 - 1, 2, False)])
def test_the_seeds_of_all_choices_have_64_bits(seed: int, n: int, right: bool) -> None:
    request = GuidedCompletionRequest(model="m", prompt="p", seed=seed, n=n)
    state: Any = SimpleNamespace(resolve=lambda name: None)
    if right:
        admit(request, Settings(), state)
        return
    with pytest.raises(GuidanceError, match="at most 9223372036854775806 with n = 2") as raised:
        admit(request, Settings(), state)
    assert raised.value.param == "seed"


# -- what fails is told as it is


def test_a_store_that_is_down_is_a_503_without_sql(http: TestClient, url: str, one: str) -> None:
    outside(url, "ALTER TABLE rollouts RENAME TO gone")
    asked = [
        http.get("/v1/rollouts"), http.get("/v1/rollouts/count"), http.get(f"/v1/rollouts/{one}"), http.get(CHAT),
        http.get("/v1/chat/completions"), http.post(f"/v1/rollouts/{one}/reward", json={"reward": 1}),
        http.delete(CHAT),
    ]  # fmt: skip
    for answer in asked:
        message = str(error_of(answer, 503)["message"])
        assert "rollout store failed" in message
        assert not any(word in message for word in SQL), message
    outside(url, "ALTER TABLE gone RENAME TO rollouts")


def test_what_is_counted_of_a_reward_does_not_make_it_fail(
    store: RolloutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout whose value is beyond all bounds, as an import once could have it."""
    odd = made(value=1e308, eta=1e6, kl=1e308)
    run(store.add([odd]))
    critics = {"sums@3": SimpleNamespace(status=SimpleNamespace(reward_range=(0.0, 1.0)))}
    with serving(store) as served:
        served.state.critics.catalog.critics = critics
        http = served.client(ADMIN)
        answer = http.post(f"/v1/rollouts/{odd.id}/reward", json={"reward": 1})
        assert (answer.status_code, answer.json()["reward"]) == (200, 1.0)
        assert all(math.isfinite(sample.value) for sample in next(iter(metrics.CALIBRATION.collect())).samples)
        monkeypatch.setattr(metrics, "observe_rewards", lambda *_: int(math.inf))
        assert http.post(f"/v1/rollouts/{odd.id}/reward", json={"reward": 0}).json()["changed"]
    found = store.get(odd.id, owner=None)
    assert found is not None
    assert found.reward == 0


# What a column may hold that no rollout has; on SQLite also what is no JSON, or too deep.
BAD = [
    ("metadata", "'5'"),
    ("metadata", "'[]'"),
    ("messages", "'{}'"),
    ("messages", "'[1]'"),
    ("response", "'[]'"),
    ("response", """'{"choice": 1}'"""),
    ("response", """'{"request": []}'"""),
    ("response", """'{"created": "x"}'"""),
    ("guidance", "'[1]'"),
]
BYTES = {"sqlite": "x'010203'", "postgresql": r"'\x010203'"}


def test_a_bad_row_is_left_out_and_counted(store: RolloutStore, url: str) -> None:
    dialect = "sqlite" if url.startswith("sqlite") else "postgresql"
    good = [made(route="chat", request_id=f"chatcmpl-g{i}") for i in range(4)]
    run(store.add(good[:1]))
    wrong = [*BAD, ("prompt_token_ids", BYTES[dialect])]
    if dialect == "sqlite":
        columns = ("metadata", "messages", "response", "guidance", "sampling_other")
        wrong += [(column, value) for column in columns for value in ("'{'", f"'{DEEP}'")]
        wrong += [("completion_text", "CAST(x'ff' AS TEXT)")]
    bad = [made(route="chat", request_id=f"chatcmpl-b{i}") for i in range(len(wrong))]
    for row, (column, value) in zip(bad, wrong, strict=True):
        run(store.add([row]))
        outside(url, f"UPDATE rollouts SET {column} = {value} WHERE id = '{row.id}'".replace(":", "\\:"))
    run(store.add(good[1:]))
    counted = RolloutStore(url, metrics.ROLLOUTS_UNREADABLE.inc)
    with serving(counted) as served:
        leaves_out(served.client(ADMIN), counted, good, bad)
    counted.close()


def leaves_out(http: TestClient, store: RolloutStore, good: list[Rollout], bad: list[Rollout]) -> None:
    def unreadable() -> float:
        return REGISTRY.get_sample_value("qsharp_rollouts_unreadable_total") or 0

    wanted, chats = [one.id for one in good], [one.request_id for one in good]
    before = unreadable()
    assert [entry["id"] for entry in http.get("/v1/rollouts?limit=1000").json()["data"]] == wanted
    assert unreadable() - before == len(bad)
    assert [entry["id"] for entry in http.get("/v1/rollouts?metadata.task=sums").json()["data"]] == wanted
    assert [entry["id"] for entry in http.get("/v1/chat/completions?limit=100").json()["data"]] == chats
    assert http.get("/v1/rollouts/export").status_code == 200
    assert [one.id for batch in store.batches(Filters(), 2, owner=None) for one in batch] == wanted
    # Each page is full although there are rows between that cannot be read.
    for path, size, ids in (("/v1/rollouts", 2, wanted), ("/v1/chat/completions", 1, chats)):
        pages: list[Any] = []
        after = ""
        while not pages or pages[-1]["has_more"]:
            pages.append(http.get(f"{path}?limit={size}{after}").json())
            after = f"&after={pages[-1]['last_id']}"
        assert [len(page["data"]) for page in pages] == [size] * (len(good) // size)
        assert [entry["id"] for page in pages for entry in page["data"]] == ids
    for row in bad:
        error_of(http.get(f"/v1/rollouts/{row.id}"), 404)
        error_of(http.get(f"/v1/chat/completions/{row.request_id}"), 404)


def test_the_words_for_metadata_name_their_limits() -> None:
    assert "at most 16 strings" in accepts(64, 16)["metadata"]
    with pytest.raises(ValueError, match="at most 16"):
        GuidedCompletionRequest(model="m", prompt="p", metadata={str(i): "x" for i in range(17)})
