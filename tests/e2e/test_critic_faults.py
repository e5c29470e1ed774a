"""Critics that fail while they guide, cannot be loaded, or are exchanged by two at once; which one is the default."""

import asyncio
import json
import random
import resource
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import psutil
from safetensors.torch import load_file, save_file

from tests.conftest import ADMIN_KEY, Server
from tests.support import models
from tests.support.processes import process_of
from tests.support.waiting import within

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
BODY = {"model": "tiny", "prompt": [*range(20, 40)], "ignore_eos": True, "return_token_ids": True}


def status(http: httpx.Client, key: str) -> dict[str, Any]:
    (found,) = [one for one in http.get("/v1/critics").json()["data"] if one["id"] == key]
    return dict(found)


def loaded(http: httpx.Client, folder: Path, **more: Any) -> dict[str, Any]:
    answer = http.post("/v1/critics", json={"path": str(folder), **more}, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def gone(http: httpx.Client, name: str) -> None:
    """Waits until no version of this critic is loaded."""
    within(10, lambda: all(one["name"] != name for one in http.get("/v1/critics").json()["data"]))


def test_scores_that_break_on_the_way(http: httpx.Client, server: Server) -> None:
    """A critic that overflows at one token: the request fails when it comes up, others go on, and nothing is kept."""
    draw = {**BODY, "max_tokens": 60, "temperature": 1.0}
    first = http.post("/v1/completions", json={**draw, "logprobs": 2, "seed": 1}).json()["choices"][0]
    likely = [set(top) for top in first["logprobs"]["top_logprobs"]]
    # It first comes into question at the sixth token or later.
    (poison, *_) = [
        token
        for i, token in enumerate(first["token_ids"])
        if i > 5 and token > 40 and not any(first["logprobs"]["tokens"][i] in tops for tops in likely[:i])
    ]
    folder = models.write_critic(server.root / "poison", kind="gpt2", name="poison", seed=31)
    (weights,) = (folder / "backbone").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["wte.weight"][poison] = 3e38  # a mean over it overflows
    save_file(tensors, weights, metadata={"format": "pt"})
    loaded(http, folder)
    guided = {**draw, "seed": 1, "stream": True, "eta": 1e4, "guidance": {"critic": "poison", "candidates": 2}}

    async def main() -> tuple[list[dict[str, Any]], list[httpx.Response]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:

            async def broken() -> list[dict[str, Any]]:
                async with client.stream("POST", "/v1/completions", json=guided) as events:
                    lines = [line async for line in events.aiter_lines() if line.startswith("data: {")]
                return [json.loads(line.removeprefix("data: ")) for line in lines]

            sound = {**draw, "eta": 0.1, "guidance": {"critic": "plain", "detail": "tokens"}}
            events, *others = await asyncio.gather(
                broken(), *(client.post("/v1/completions", json=sound) for _ in range(6))
            )
            return events, others

    events, others = asyncio.run(main())
    assert events[-1]["error"]["code"] == 500
    assert "not_finite" in events[-1]["error"]["message"]
    assert sum(len(event["choices"][0]["token_ids"] or ()) for event in events[:-1] if event["choices"]) >= 5
    for other in others:
        guidance = other.json()["choices"][0]["guidance"]
        assert guidance["tokens_total"] == len(guidance["tokens"]) == 60
        assert guidance["tokens_guided"] > 0
    left = status(http, "poison@1")
    assert (left["users"], left["in_flight"]) == (0, 0)
    assert http.delete("/v1/critics/poison/1", headers=ADMIN).status_code == 200


def test_a_load_that_runs_out_of_memory(http: httpx.Client, server: Server) -> None:
    folder = models.write_critic(server.root / "large", name="large", mlp=1_000_000)  # 260 MB
    processes = psutil.Process(process_of(server.url)).children(recursive=True)
    limits = {p.pid: resource.prlimit(p.pid, resource.RLIMIT_AS) for p in processes}
    for process in processes:
        most = process.memory_info().vms + 150 * 2**20
        resource.prlimit(process.pid, resource.RLIMIT_AS, (most, limits[process.pid][1]))
    try:
        answer = http.post("/v1/critics", json={"path": str(folder)}, headers=ADMIN)
        assert answer.status_code == 400, answer.text
        message = answer.json()["error"]["message"]
        assert "memory" in message, message
        guided = http.post("/v1/completions", json={**BODY, "max_tokens": 8, "eta": 0.1})
        assert guided.status_code == 200, guided.text
    finally:
        for pid, limit in limits.items():
            resource.prlimit(pid, resource.RLIMIT_AS, limit)
    assert loaded(http, folder)["id"] == "large@1"
    assert http.delete("/v1/critics/large/1", headers=ADMIN).status_code == 200
    shutil.rmtree(folder)


def test_two_admins_at_once(http: httpx.Client, server: Server) -> None:
    """Both load, activate and unload the same versions, while clients are guided by the name alone."""
    folders = [models.write_critic(server.root / f"duel{v}", name="duel", version=str(v), seed=40 + v) for v in (1, 2)]
    loaded(http, folders[0])

    async def admin(client: httpx.AsyncClient, dice: random.Random, until: asyncio.Event) -> list[tuple[str, int]]:
        seen = []
        while not until.is_set():
            method, path, body = dice.choice(
                [
                    ("POST", "", {"path": str(folders[1])}), ("POST", "", {"path": str(folders[1]), "activate": True}),
                    ("POST", "/duel/activate", {"version": "1"}), ("POST", "/duel/activate", {"version": "2"}),
                    ("POST", "/duel/rollback", None), ("DELETE", "/duel/2", None),
                ]
            )  # fmt: skip
            answer = await client.request(method, f"/v1/critics{path}", json=body, headers=ADMIN)
            seen.append((f"{method} {path}", answer.status_code))
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]
        return seen

    async def user(client: httpx.AsyncClient, dice: random.Random, until: asyncio.Event) -> list[dict[str, Any]]:
        seen = []
        while not until.is_set():
            body = {**BODY, "max_tokens": dice.randint(1, 40), "eta": 0.2, "guidance": {"critic": "duel"}}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            guidance = answer.json()["choices"][0]["guidance"]
            assert guidance["tokens_total"] == body["max_tokens"]
            seen.append(guidance)
        return seen

    async def main() -> tuple[list[tuple[str, int]], list[dict[str, Any]]]:
        until = asyncio.Event()
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            admins = [asyncio.create_task(admin(client, random.Random(i), until)) for i in range(2)]
            users = [asyncio.create_task(user(client, random.Random(9 + i), until)) for i in range(6)]
            await asyncio.wait([*admins, *users], timeout=6, return_when=asyncio.FIRST_EXCEPTION)
            until.set()
            return (
                list(chain.from_iterable(await asyncio.gather(*admins))),
                list(chain.from_iterable(await asyncio.gather(*users))),
            )

    calls, answers = asyncio.run(main())
    statuses = {code for _, code in calls}
    assert statuses <= {200, 202, 400, 404, 409}, calls
    assert 200 in statuses
    assert {one["critic"] for one in answers} == {"duel@1", "duel@2"}
    assert http.post("/v1/critics/duel/activate", json={"version": "1"}, headers=ADMIN).status_code == 200
    http.delete("/v1/critics/duel/2", headers=ADMIN)
    assert status(http, "duel@1")["in_flight"] == 0
    assert http.delete("/v1/critics/duel/1", headers=ADMIN).status_code == 200
    gone(http, "duel")


def test_the_active_version_goes_while_the_other_is_still_leaving(http: httpx.Client, server: Server) -> None:
    """A version that waits for its last request cannot be activated, so it holds no other back."""
    for version in ("1", "2"):
        folder = server.root / f"leaving{version}"
        loaded(http, models.write_critic(folder, name="leaving", version=version, seed=50 + int(version)))
    long = {**BODY, "max_tokens": 450, "eta": 0.2, "guidance": {"critic": "leaving@2"}, "stream": True}
    with http.stream("POST", "/v1/completions", json=long) as events:
        assert events.status_code == 200
        lines = events.iter_lines()  # kept: it would close the stream
        next(lines)
        unloaded = http.delete("/v1/critics/leaving/2", headers=ADMIN)
        assert (unloaded.status_code, unloaded.json()["leaving"]) == (202, True), unloaded.text
        active = http.delete("/v1/critics/leaving/1", headers=ADMIN)
        assert active.status_code == 200, active.text
        assert status(http, "leaving@2")["in_flight"] == 1
    gone(http, "leaving")


def test_the_default_changes_only_when_it_is_told_to(http: httpx.Client, server: Server) -> None:
    def guided(**guidance: str) -> httpx.Response:
        return http.post("/v1/completions", json={**BODY, "max_tokens": 3, "eta": 0.1, "guidance": guidance})

    def critic(answer: httpx.Response) -> str:
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["guidance"]["critic"])

    assert critic(guided()) == "plain@1"
    assert http.delete("/v1/critics/plain/1", headers=ADMIN).status_code == 200
    try:
        refused = guided()
        assert refused.status_code == 409
        error = refused.json()["error"]
        assert error["param"] == "guidance.critic"
        assert "'plain' is not loaded" in error["message"]
        assert critic(guided(critic="fast")) == "fast@1"
    finally:
        loaded(http, server.critics["plain"])
    assert critic(guided()) == "plain@1"
    assert status(http, "plain@1")["default"]
    for name in ("fast", "plain"):
        body = {"version": "1", "default": True}
        changed = http.post(f"/v1/critics/{name}/activate", json=body, headers=ADMIN)
        assert changed.json()["default"]
        assert critic(guided()) == f"{name}@1"
