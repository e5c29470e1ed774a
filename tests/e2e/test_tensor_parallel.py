"""One engine on two ranks (`--tensor-parallel-size 2`): the critic lives on the first, and both sample alike.

Every rank samples on its own and keeps its half of the reference's keys and values. Where one of them drew another
token than the other, all later logits are wrong, and so is every number that is compared here.
"""

import asyncio
import math
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ADMIN_KEY, CACHE_GIB, Server, flags
from tests.e2e.test_exact import check, metric, requests, run_all
from tests.support import models
from trainer.serving import serve

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
PROMPT = list(range(20, 40))
ROWS = 12
PREEMPTED = "vllm:num_preemptions_total"
# vLLM gives a rank a NUMA node of its own, unless it is told which cores are whose.
BINDING = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("tp")
    reference = models.write_reference(root / "reference", kind="qwen2", seed=9)
    critics = {
        "plain": models.write_critic(root / "plain", name="plain", seed=1),
        "fast": models.write_critic(root / "fast", kind="qwen2", head="Q", name="fast", seed=3),
        "native": models.write_native_critic(root / "native", reference, name="native", seed=6),
    }
    arguments = [*flags(reference, critics, rows=ROWS, blocks=18), "--tensor-parallel-size", "2"]
    with serve(arguments, root / "log", BINDING) as url:
        yield Server(url, reference, critics, root, root / "log")


def unseeded(server: Server, seed: int) -> list[dict[str, Any]]:
    """Requests of which half draw from the generator that the ranks must use in step."""
    rng = random.Random(seed)
    bodies = requests(server, rng, count=32, longest=140, tokens=48)
    for body in bodies[::2]:
        del body["seed"]
    return bodies


def load(server: Server, http: httpx.Client, **options: Any) -> None:
    folder = models.write_critic(server.root / f"{options['name']}-{options['version']}", **options)
    body = {"path": str(folder), "activate": True}
    assert http.post("/v1/critics", json=body, headers=ADMIN).status_code == 200


def test_every_token_is_exact(server: Server) -> None:
    bodies, before = unseeded(server, 31), metric(server, PREEMPTED)
    answers = asyncio.run(run_all(server, bodies, at_once=ROWS))
    assert metric(server, PREEMPTED) > before
    compared = sum(check(server, body, got) for body, choices in zip(bodies, answers, strict=True) for got in choices)
    assert compared > 250


def test_a_critic_is_loaded_and_activated_under_load(server: Server, http: httpx.Client) -> None:
    async def run() -> list[list[dict[str, Any]]]:
        serving = asyncio.create_task(run_all(server, bodies, at_once=ROWS))
        # Its head has a layer that is initialised before it is filled: a draw too many on the first rank.
        await asyncio.to_thread(load, server, http, name="deep", version="2", kind="mistral", mlp=32, seed=5)
        return await serving

    bodies = unseeded(server, 32)[8:16]
    answers = asyncio.run(run())
    assert sum(check(server, body, got) for body, each in zip(bodies, answers, strict=True) for got in each) > 100

    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 1.0, "eta": 0.1, "ignore_eos": True}
    body |= {"stream": False, "n": 1, "guidance": {"critic": "deep", "detail": "tokens"}}
    ((got,),) = asyncio.run(run_all(server, [body], at_once=1))
    assert got["critic"] == "deep@2"
    got["critic"] = "deep@1"  # what `check` expects of all critics
    server.critics["deep"] = server.root / "deep-2"
    assert check(server, body, got) > 10
    assert got["tokens_guided"] > 0
    assert http.delete("/v1/critics/deep/2", headers=ADMIN).status_code in (200, 202)
    del server.critics["deep"]


def test_a_critic_whose_scores_overflow_fails_its_requests_alone(server: Server, http: httpx.Client) -> None:
    folder = models.write_critic(server.root / "broken", name="broken")
    head = load_file(folder / "head.safetensors")
    head["weight"] = torch.full_like(head["weight"], 3e38)
    save_file(head, folder / "head.safetensors")
    assert http.post("/v1/critics", json={"path": str(folder)}, headers=ADMIN).status_code == 200

    async def run() -> tuple[list[list[dict[str, Any]]], list[httpx.Response]]:
        wrong = {"model": "tiny", "prompt": PROMPT, "max_tokens": 50, "eta": 0.1, "guidance": {"critic": "broken"}}
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            failing = [client.post("/v1/completions", json=wrong) for _ in range(4)]
            return await asyncio.gather(run_all(server, bodies, at_once=4), asyncio.gather(*failing))

    bodies = unseeded(server, 33)[8:14]
    answers, failed = asyncio.run(run())
    assert [answer.status_code for answer in failed] == [500] * 4, failed[0].text
    assert sum(check(server, body, got) for body, each in zip(bodies, answers, strict=True) for got in each) > 60
    assert 'qsharp_critic_failures_total{reason="not_finite"}' in http.get("/metrics").text
    assert http.delete("/v1/critics/broken/1", headers=ADMIN).status_code in (200, 202)


def test_everything_is_given_back_and_counted_once(http: httpx.Client) -> None:
    deadline = time.monotonic() + 20
    while True:
        listed = http.get("/v1/critics").json()["data"]
        held = {one["id"]: (one["users"], one["kv_blocks_used"]) for one in listed}
        if held == {"plain@1": (0, 0), "fast@1": (0, 0), "native@1": (0, None)}:
            break
        assert time.monotonic() < deadline, listed
        time.sleep(0.2)
    # What the cache's setting holds: 512 bytes a token of "plain", 1,536 of "fast".
    room = CACHE_GIB * 512 * 2**30
    assert [one["kv_blocks"] for one in listed] == [math.ceil(room // size / 16) for size in (512, 1536)] + [None]
