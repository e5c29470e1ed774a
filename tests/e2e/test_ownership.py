"""Two holders of keys and an admin on one running server: what each stores is theirs, whatever they send."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.access import keys
from tests.conftest import ADMIN_KEY
from tests.support import models
from tests.support.store_server import error_of
from trainer.serving import serve

PROMPT = list(range(20, 40))
MESSAGES = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Holders:
    """Clients of one server, by the key that they send."""

    ann: httpx.Client
    bob: httpx.Client
    admin: httpx.Client


@pytest.fixture(scope="module")
def holders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Holders]:
    root = tmp_path_factory.mktemp("owned")
    reference, critic = models.write_reference(root / "reference"), models.write_critic(root / "plain", name="plain")
    file: Path = root / "keys.json"
    given = [keys.add(file, "ann"), keys.add(file, "bob"), ADMIN_KEY]
    arguments = [
        str(reference), "--critic", str(critic), "--served-model-name", "tiny", "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "50000000",
        "--rollouts", f"sqlite:///{root / 'rollouts.db'}", "--keys", str(file), "--admin-key", ADMIN_KEY,
    ]  # fmt: skip
    with serve(arguments, root / "log") as url:
        clients = [httpx.Client(base_url=url, timeout=120, headers={"Authorization": f"Bearer {k}"}) for k in given]
        yield Holders(*clients)
        for client in clients:
            client.close()


def complete(http: httpx.Client, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "ignore_eos": True, "store": True, **fields}
    return http.post("/v1/completions", json=body)


def chat(http: httpx.Client, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "store": True, **fields}
    return http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "mine"})


def test_what_is_stored_belongs_to_the_key_that_sent_it(holders: Holders) -> None:
    for stream in (False, True):
        answer = complete(holders.ann, stream=stream, eta=0.1)
        assert answer.status_code == 200
    stored = holders.ann.get("/v1/rollouts").json()["data"]
    assert [entry["owner"] for entry in stored] == ["ann"] * 2
    for entry in stored:
        error_of(holders.bob.get(f"/v1/rollouts/{entry['id']}"), 404)
        assert holders.admin.get(f"/v1/rollouts/{entry['id']}").json()["owner"] == "ann"
    assert holders.bob.get("/v1/rollouts").json()["data"] == []


def test_a_roll_out_continues_ones_own_rollouts_alone(holders: Holders) -> None:
    parent = complete(holders.ann, eta=0.1, return_token_ids=True).json()["choices"][0]
    prompt = PROMPT + parent["token_ids"][:3]

    def continued(http: httpx.Client, name: str) -> Any:
        return complete(http, prompt=prompt, eta=None, metadata={"qsharp_parent": name, "qsharp_cut": "3"})

    theirs = error_of(continued(holders.bob, parent["rollout_id"]), 400)
    nobodys = error_of(continued(holders.bob, "rol_none"), 400)
    assert theirs["param"] == nobodys["param"] == "metadata"
    assert str(theirs["message"]).replace(parent["rollout_id"], "rol_none") == nobodys["message"]
    for http, owner in ((holders.ann, "ann"), (holders.admin, "admin")):
        made = continued(http, parent["rollout_id"]).json()["choices"][0]
        kept = holders.admin.get(f"/v1/rollouts/{made['rollout_id']}").json()
        assert (kept["parent_id"], kept["owner"]) == (parent["rollout_id"], owner)


def test_the_same_request_id_replaces_nothing(holders: Holders) -> None:
    """vLLM would name the response after it."""
    first, second, other = (chat(http).json() for http in (holders.ann, holders.ann, holders.bob))
    assert len({first["id"], second["id"], other["id"]}) == 3
    path = f"/v1/chat/completions/{first['id']}"
    assert holders.ann.get(path).json()["choices"][0]["message"] == first["choices"][0]["message"]
    error_of(holders.bob.get(path), 404)
    error_of(holders.bob.delete(path), 404)
    assert [entry["id"] for entry in holders.bob.get("/v1/chat/completions").json()["data"]] == [other["id"]]


def test_a_reward_has_its_giver(holders: Holders) -> None:
    name = complete(holders.ann).json()["choices"][0]["rollout_id"]
    for http, reward in ((holders.ann, 1), (holders.admin, 0)):
        answer = http.post(f"/v1/rollouts/{name}/reward", json={"reward": reward}).json()
    assert [(entry["given_by"], entry["reward"]) for entry in answer["rewards"]] == [("ann", 1.0), ("admin", 0.0)]
    error_of(holders.bob.post(f"/v1/rollouts/{name}/reward", json={"reward": 1}), 404)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"seed": 2**63 - 1, "n": 2}, "seed"),
        ({"metadata": {str(i): "x" for i in range(10_000)}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata"),
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
    ],
)
def test_what_the_store_cannot_take_is_refused_before_it_is_sampled(
    holders: Holders, fields: dict[str, Any], param: str
) -> None:
    for send in (complete, chat):
        assert error_of(send(holders.ann, **fields), 400)["param"] == param


def test_the_last_seeds_are_stored(holders: Holders) -> None:
    ids = [choice["rollout_id"] for choice in complete(holders.ann, seed=2**63 - 2, n=2).json()["choices"]]
    seeds = [holders.ann.get(f"/v1/rollouts/{name}").json()["sampling"]["seed"] for name in ids]
    assert seeds == [2**63 - 2, 2**63 - 1]


def test_fields_that_are_too_deep_are_not_stored(holders: Holders) -> None:
    deep: Any = {"type": "string"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep}}
    tool = {"type": "function", "function": {"name": "pick", "parameters": deep}}
    assert error_of(chat(holders.ann, tools=[tool], tool_choice="none"), 400)["param"] == "tools"
    assert chat(holders.ann, tools=[tool], tool_choice="none", store=False).status_code == 200
