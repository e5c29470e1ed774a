"""Whose rollouts a key reads and changes, who gave a reward, and what becomes of what was stored before."""

import io
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from alembic import command
from sqlalchemy import create_engine, text
from starlette.testclient import TestClient

from qsharp_core.rollouts import parquet
from qsharp_core.rollouts.records import UNNAMED, Reward, Rollout
from server.access.keys import ADMIN
from server.store import database
from server.store.database import parse_url
from server.store.filters import Filters
from server.store.rewards import GivenReward
from server.store.rollouts import RolloutStore
from tests.server.test_store import made, run, unguided
from tests.support.store_server import error_of, serving

CHAT = "chatcmpl-1"


@dataclass
class Place:
    """Clients of one server, and a rollout and a stored chat of Ann's and one of Bob's."""

    store: RolloutStore
    ann: TestClient
    bob: TestClient
    admin: TestClient
    anns: Rollout
    bobs: Rollout
    chat: Rollout


@pytest.fixture
def place(store: RolloutStore) -> Iterator[Place]:
    anns, bobs = unguided(owner="ann"), unguided(owner="bob")
    messages = [{"role": "user", "content": "hi"}]
    chat = made(owner="ann", route="chat", request_id=CHAT, messages=messages, response={"choice": {"index": 0}})
    run(store.add([anns, bobs, chat]))
    with serving(store) as served:
        yield Place(store, served.client("ann"), served.client("bob"), served.client(ADMIN), anns, bobs, chat)


def same(one: Any, other: Any, names: tuple[str, str]) -> bool:
    """Whether two answers differ in the id that was asked for alone."""
    return one.status_code == other.status_code and one.text.replace(*names) == other.text


def test_what_belongs_to_another_does_not_exist(place: Place) -> None:
    """The same words as for what was never there, and nothing changes."""
    none, given = "rol_none", {"reward": 1.0}
    requests: list[tuple[str, str, str, dict[str, Any]]] = [
        ("GET", "/v1/rollouts/{}", place.anns.id, {}),
        ("POST", "/v1/rollouts/{}/reward", place.anns.id, {"json": given}),
        ("GET", "/v1/rollouts?after={}", place.anns.id, {}),
        ("GET", "/v1/chat/completions/chatcmpl-{}", "1", {}),
        ("GET", "/v1/chat/completions/chatcmpl-{}/messages", "1", {}),
        ("POST", "/v1/chat/completions/chatcmpl-{}", "1", {"json": {"metadata": {"a": "b"}}}),
        ("DELETE", "/v1/chat/completions/chatcmpl-{}", "1", {}),
        ("GET", "/v1/chat/completions?after=chatcmpl-{}", "1", {}),
    ]
    for method, path, name, body in requests:
        theirs = place.bob.request(method, path.format(name), **body)
        nobodys = place.bob.request(method, path.format(none), **body)
        assert theirs.status_code in (400, 404), (path, theirs.text)
        assert same(theirs, nobodys, (name, none)) or "chatcmpl-" in path, path
        assert theirs.json()["error"]["type"] == nobodys.json()["error"]["type"]
        assert theirs.json()["error"]["param"] == nobodys.json()["error"]["param"]
    batch = {"items": [{"id": place.bobs.id, **given}, {"id": place.anns.id, **given}]}
    error = error_of(place.bob.post("/v1/rollouts/rewards", json=batch), 400)
    assert error["param"] == "items[1].id"
    assert place.store.get(place.anns.id, owner=None) == place.anns
    assert place.store.get(place.bobs.id, owner=None) == place.bobs
    assert place.store.response(CHAT, owner=None) == [place.chat]


def test_lists_counts_and_exports_have_the_callers_own(place: Place) -> None:
    def ids(who: TestClient, query: str = "") -> list[str]:
        listed = [entry["id"] for entry in who.get(f"/v1/rollouts{query}").json()["data"]]
        table = pq.read_table(io.BytesIO(who.get(f"/v1/rollouts/export{query}").content))
        assert table["id"].to_pylist() == listed
        assert who.get(f"/v1/rollouts/count{query}").json()["count"] == len(listed)
        return listed

    anns, bobs, chat = place.anns.id, place.bobs.id, place.chat.id
    assert ids(place.ann) == ids(place.ann, "?owner=ann") == ids(place.ann, "?owner=bob,ann") == [anns, chat]
    assert ids(place.bob) == [bobs]
    assert ids(place.bob, "?owner=ann") == []
    assert ids(place.admin) == [anns, bobs, chat]
    assert ids(place.admin, "?owner=bob") == [bobs]
    assert ids(place.admin, "?owner=bob,ann,none") == [anns, bobs, chat]
    assert place.bob.get("/v1/chat/completions").json()["data"] == []
    for who in (place.ann, place.admin):
        assert [entry["id"] for entry in who.get("/v1/chat/completions").json()["data"]] == [CHAT]
    assert place.ann.get(f"/v1/rollouts/{anns}").json()["owner"] == "ann"


def test_the_owner_and_the_admin_may_change_it(place: Place) -> None:
    path = f"/v1/chat/completions/{CHAT}"
    assert place.ann.post(path, json={"metadata": {"a": "b"}}).json()["metadata"] == {"a": "b"}
    assert place.admin.post(path, json={"metadata": {"c": "d"}}).json()["metadata"] == {"c": "d"}
    assert place.ann.get(path + "/messages").json()["data"][0]["content"] == "hi"
    assert place.admin.delete(path).json()["deleted"]
    assert place.store.get(place.chat.id, owner=None) is None


def test_the_history_says_who_gave_a_reward(place: Place) -> None:
    path = f"/v1/rollouts/{place.anns.id}/reward"
    given = [
        (place.ann, 1.0, True),
        (place.ann, 1.0, False),
        (place.admin, 1.0, False),  # agrees
        (place.admin, 0.0, True),
        (place.ann, 0.0, False),
        (place.ann, 0.0, False),
    ]
    for who, reward, changed in given:
        answer = who.post(path, json={"reward": reward, "source": "s"}).json()
        assert (answer["reward"], answer["changed"]) == (reward, changed)
    history = [("ann", 1.0), (ADMIN, 1.0), (ADMIN, 0.0), ("ann", 0.0)]
    assert [(entry["given_by"], entry["reward"]) for entry in answer["rewards"]] == history
    shown = place.ann.get(f"/v1/rollouts/{place.anns.id}").json()
    assert shown["rewards"] == answer["rewards"]


def test_whoever_comes_back_to_a_reward_is_noted(store: RolloutStore) -> None:
    """Of A and B the last one is A's, although C had set the rollout to it already."""
    one = unguided()
    run(store.add([one]))
    for giver, reward in [("a", 1.0), ("b", 0.0), ("c", 1.0), ("a", 1.0), ("a", 1.0)]:
        run(store.add_rewards([GivenReward(one.id, reward)], owner=None, given_by=giver))
    (found,) = store.page(Filters(rewarded_by=["a", "b"]), owner=None).data
    assert [entry.given_by for entry in found.rewards] == ["a", "b", "a"]
    assert found.reward == 1.0


def test_only_rewards_of_those_who_are_named_count(place: Place) -> None:
    """Ann's own reward is the present one of her rollout, and Bob's has none but his own."""
    given = [(place.admin, place.anns, 0.25), (place.ann, place.anns, 1.0), (place.bob, place.bobs, 1.0)]
    for who, rollout, reward in given:
        assert who.post(f"/v1/rollouts/{rollout.id}/reward", json={"reward": reward}).status_code == 200

    def rewards(query: str) -> dict[str, float | None]:
        answer = place.admin.get(f"/v1/rollouts?{query}").json()
        table = pq.read_table(io.BytesIO(place.admin.get(f"/v1/rollouts/export?{query}").content))
        listed = {entry["id"]: entry["reward"] for entry in answer["data"]}
        assert dict(zip(table["id"].to_pylist(), table["reward"].to_pylist(), strict=True)) == listed
        assert place.admin.get(f"/v1/rollouts/count?{query}").json()["count"] == len(listed)
        return listed

    anns, bobs, chat = place.anns.id, place.bobs.id, place.chat.id
    assert rewards("has_reward=true") == {anns: 1.0, bobs: 1.0}
    assert rewards("rewarded_by=admin") == rewards("rewarded_by=admin&has_reward=true") == {anns: 0.25}
    assert rewards("rewarded_by=admin,bob") == {anns: 0.25, bobs: 1.0}
    assert rewards("rewarded_by=ann") == {anns: 1.0}
    assert rewards("rewarded_by=admin&has_reward=false") == {bobs: None, chat: None}
    assert rewards("rewarded_by=nobody") == {}


def file_of(*rollouts: Rollout, without: tuple[str, ...] = ()) -> bytes:
    table = pq.read_table(io.BytesIO(b"".join(parquet.write([list(rollouts)]))))
    sink = io.BytesIO()
    pq.write_table(table.drop_columns(list(without)), sink)
    return sink.getvalue()


def test_only_an_admin_imports(place: Place) -> None:
    forged = made(owner="ann", rewards=(Reward(1.0, "me", 1.0, ADMIN),), reward=1.0)
    for who in (place.ann, place.bob):
        assert (
            error_of(who.post("/v1/rollouts/import", content=file_of(forged)), 403)["type"] == "PermissionDeniedError"
        )
    assert place.store.get(forged.id, owner=None) is None
    assert place.admin.post("/v1/rollouts/import", content=file_of(forged)).json()["imported"] == 1
    assert place.store.get(forged.id, owner="ann") == forged
    assert place.store.get(forged.id, owner="bob") is None


def test_what_a_file_gives_no_owner_is_the_importers(place: Place) -> None:
    one = unguided(owner="elsewhere")
    body = file_of(one, without=("owner",))
    assert place.admin.post("/v1/rollouts/import", content=body).json()["imported"] == 1
    found = place.store.get(one.id, owner=ADMIN)
    assert found is not None
    assert found.owner == ADMIN


def test_files_from_before_there_were_owners_are_read(tmp_path: Path) -> None:
    one = made(rewards=(Reward(1.0, "a", 2.0),), reward=1.0)
    (tmp_path / "old.parquet").write_bytes(file_of(one, without=("owner",)))
    table = pq.read_table(tmp_path / "old.parquet")
    rewards = [
        [{k: v for k, v in entry.items() if k != "given_by"} for entry in row] for row in table["rewards"].to_pylist()
    ]
    pq.write_table(
        table.set_column(table.column_names.index("rewards"), "rewards", [rewards]), tmp_path / "old.parquet"
    )
    assert list(parquet.read(tmp_path / "old.parquet")) == [[one]]


# -- databases from before


def old_database(path: Path, url: str) -> None:
    """A database of revision 0001, with two chats that have one id, and a reward."""
    engine = create_engine(parse_url(url))
    config = database._config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    columns = (
        "id, request_id, choice, route, created, model, temperature, top_p, top_k, min_p, kl, metadata, sampling_other,"
        " prompt_token_ids, completion_token_ids, completion_text"
    )
    blob = "''" if url.startswith("postgresql") else "x''"
    rows = [
        ("a", "chatcmpl-x", 0, 1.25),
        ("b", "chatcmpl-x", 1, 1.25),
        ("c", "chatcmpl-x", 0, 2.5),
        ("d", "chatcmpl-y", 0, 3),
    ]
    with engine.begin() as connection:
        for name, request, choice, created in rows:
            named = f"'{name}', '{request}', {choice}, 'chat', {created}, 'm'"
            values = f"{named}, 1, 1, 0, 0, 0, '{{}}', '{{}}', {blob}, {blob}, ''"
            connection.execute(text(f"INSERT INTO rollouts ({columns}) VALUES ({values})".replace(":", "\\:")))
        connection.execute(text("INSERT INTO rewards (rollout_id, reward, created) VALUES ('a', 1, 1)"))
    engine.dispose()


def test_an_old_database_is_read(url: str, tmp_path: Path) -> None:
    old_database(tmp_path, url)
    store = RolloutStore(url)
    responses, more = store.responses(Filters(), None, 9, "asc", owner=UNNAMED)
    assert ([[one.id for one in choices] for choices in responses], more) == ([["a", "b"], ["c"], ["d"]], False)
    assert [choices[0].request_id for choices in responses] == ["chatcmpl-x-1", "chatcmpl-x", "chatcmpl-y"]
    assert [one.id for one in store.response("chatcmpl-x", owner=UNNAMED)] == ["c"]
    assert store.responses(Filters(), None, 9, "asc", owner="ann") == ([], False)
    one = store.get("a", owner=UNNAMED)
    assert one is not None
    assert one.rewards == (Reward(1.0, None, 1.0, None),)
    assert store.count(Filters(rewarded_by=["ann"]), owner=None) == 0
    run(store.add_rewards([GivenReward("a", 1.0)], owner=None, given_by="ann"))  # the same one, now by a name
    assert store.count(Filters(rewarded_by=["ann"]), owner=None) == 1
    store.close()


def test_a_list_of_one_owner_uses_its_index(tmp_path: Path) -> None:
    store = RolloutStore(str(tmp_path / "r.db"))
    run(store.add([unguided(owner=f"o{i % 3}") for i in range(30)]))
    store.close()
    plan = sqlite3.connect(tmp_path / "r.db").execute(
        "EXPLAIN QUERY PLAN SELECT * FROM rollouts WHERE owner = 'o1' AND seq > 5 ORDER BY seq LIMIT 3"
    )
    (step,) = [row[3] for row in plan]
    assert "ix_rollouts_owner_seq" in step
