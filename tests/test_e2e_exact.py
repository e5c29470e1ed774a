"""Every reported number of every token, against plain transformers in float64."""

import asyncio
import itertools
import json
import math
import os
import random
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scipy import stats

from qsharp_core.vllm_plugin.params import DEFAULT_MIN_PROB
from tests import models, oracle
from tests.conftest import Server

TOLERANCE = 5e-3
ETAS = [0.02, 0.1, 0.3, 1.0, 10.0]


def prompt_ids(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(3, models.VOCAB) for _ in range(rng.randrange(2, longest))]


def requests(server: Server, rng: random.Random, longest: int, tokens: int) -> list[dict[str, Any]]:
    """Every combination of critic, method and tail, with the other fields drawn; and unguided ones among them."""
    shared = prompt_ids(rng, longest)
    bodies: list[dict[str, Any]] = []
    for critic, method, tail in itertools.product(server.critics, ["qsharp", "cd"], ["floor", "keep", "drop"]):
        body: dict[str, Any] = {
            "eta": rng.choice(ETAS),
            "guidance": {"critic": critic, "method": method, "tail": tail, "detail": "tokens"},
        }
        if rng.random() < 0.6:
            body["guidance"]["candidates"] = rng.choice([1, 2, 5, 64])
        if rng.random() < 0.4:
            body["guidance"]["min_prob"] = rng.choice([0.01, 0.05, 0.2])
        if rng.random() < 0.2:
            body |= {"top_p": 0.8, "top_k": 10}
        if rng.random() < 0.2:
            body["logit_bias"] = {"40": 4.0, "50": -3.0}
        bodies.append(body)
    bodies += [{"eta": None, "guidance": {"detail": "tokens"}} for _ in range(4)]
    for body in bodies:
        prompt = prompt_ids(rng, longest)
        body |= {
            "model": "tiny",
            "prompt": shared + prompt[:8] if rng.random() < 0.4 else prompt,
            "temperature": rng.choice([0.0, 0.7, 1.0, 1.0, 1.3]),
            "max_tokens": rng.randrange(tokens // 2, tokens),
            "n": rng.choice([1, 1, 1, 2]),
            "stream": rng.random() < 0.5,
            "ignore_eos": rng.random() < 0.7,
            "seed": rng.randrange(2**31),
        }
        if body["temperature"] == 0:
            body["n"] = 1
    rng.shuffle(bodies)
    return bodies


async def send(client: httpx.AsyncClient, gate: asyncio.Semaphore, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The guidance of each choice."""
    async with gate:
        if not body["stream"]:
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return [choice["guidance"] for choice in answer.json()["choices"]]
        found: dict[int, dict[str, Any]] = {}
        async with client.stream("POST", "/v1/completions", json=body) as stream:
            assert stream.status_code == 200, await stream.aread()
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        assert ("guidance" in choice) == (choice["finish_reason"] is not None)
                        if "guidance" in choice:
                            found[choice["index"]] = choice["guidance"]
        return [found[i] for i in range(body["n"])]


def unambiguous(
    server: Server, body: dict[str, Any], got: dict[str, Any]
) -> list[tuple[dict[str, Any], oracle.Expected]]:
    """Each token of a choice, and what the oracle says of it; without those of which it cannot say it."""
    options = body["guidance"]
    tokens = [entry["token_id"] for entry in got["tokens"]]
    assert got["tokens_total"] == len(tokens) > 0
    wanted = oracle.completion(
        server.reference,
        server.critics[options["critic"]] if body["eta"] is not None else None,
        body["prompt"],
        tokens,
        eta=body["eta"],
        temperature=body["temperature"],
        candidates=options.get("candidates", 20),
        min_prob=options.get("min_prob", DEFAULT_MIN_PROB),
        tail=options.get("tail", "floor"),
        method=options.get("method", "qsharp"),
        bias={int(k): v for k, v in body.get("logit_bias", {}).items()},
    )
    return [(entry, want) for entry, want in zip(got["tokens"], wanted, strict=True) if not want.ambiguous]


def check(server: Server, body: dict[str, Any], got: dict[str, Any]) -> int:
    """One choice against the oracle; returns how many tokens were compared."""
    options = body["guidance"]
    clear = unambiguous(server, body, got)
    for entry, want in clear:
        where = (body, entry, want)
        assert entry["kl"] == pytest.approx(want.kl, abs=TOLERANCE, rel=1e-4), where
        assert entry["ref_logprob"] == pytest.approx(want.ref_logprob, abs=TOLERANCE), where
        assert entry["logprob"] == pytest.approx(want.logprob, abs=TOLERANCE), where
        assert (entry["value"] is None) == (want.value is None), where
        if want.value is not None:
            assert entry["value"] == pytest.approx(want.value, abs=TOLERANCE), where
        if body["temperature"] == 0 and want.pi.topk(2).values.diff().abs().item() > 1e-5:
            assert want.token_id == int(want.pi.argmax()), where
    assert got["kl"] == pytest.approx(sum(entry["kl"] for entry in got["tokens"]), abs=1e-6)
    assert got["value"] == next((entry["value"] for entry in got["tokens"] if entry["value"] is not None), None)
    assert got["tokens_guided"] == sum(entry["value"] is not None for entry in got["tokens"])
    assert got["eta"] == body["eta"]
    assert got["critic"] == (f"{options['critic']}@1" if body["eta"] is not None else None)
    return len(clear)


async def run_all(server: Server, bodies: list[dict[str, Any]], at_once: int) -> list[list[dict[str, Any]]]:
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        return await asyncio.gather(*(send(client, gate, body) for body in bodies))


def residuals(server: Server, body: dict[str, Any], got: dict[str, Any]) -> list[float]:
    """`|V(x') - V(x) - eta ln(pi/ref)|` of candidates, `x'` being where the critic was asked next."""
    options = body["guidance"]
    if body["eta"] is None or options["method"] == "cd":
        return []
    least = json.loads((server.critics[options["critic"]] / "critic.json").read_text())["reward_range"][0]
    asked = [i for i, token in enumerate(got["tokens"]) if token["value"] is not None]
    found = []
    for here, there in itertools.pairwise(asked):
        token = got["tokens"][here]
        gain = body["eta"] * (token["logprob"] - token["ref_logprob"])
        of_tail = {"floor": token["value"] + gain - least, "keep": gain}.get(options["tail"])
        between = math.exp(sum(token["ref_logprob"] for token in got["tokens"][here + 1 : there]))
        if between >= 0.9 and (of_tail is None or of_tail != pytest.approx(0, abs=1e-8)):
            found.append(abs(got["tokens"][there]["value"] - token["value"] - gain))
    return found


def residual_metric(server: Server) -> dict[str, dict[str, float]]:
    """`sum` and `count` of the metric, by critic."""
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", follow_redirects=True).text)
    (family,) = (family for family in families if family.name == "qsharp_bellman_residual")
    found: dict[str, dict[str, float]] = {"sum": {}, "count": {}}
    for sample in family.samples:
        part = sample.name.removeprefix("qsharp_bellman_residual_")
        if part in found:
            assert sample.labels["version"] == "1"
            found[part][sample.labels["name"]] = sample.value
    return found


def preemptions(server: Server) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_preemptions_total"))


def test_every_field_of_every_token_under_load(server: Server) -> None:
    rng = random.Random(7)
    bodies = requests(server, rng, longest=120, tokens=48)
    before, residual_before = preemptions(server), residual_metric(server)
    answers = asyncio.run(run_all(server, bodies, at_once=16))
    assert preemptions(server) > before, "the cache was to be so small that requests are preempted"
    assert any(len(body["prompt"]) > 48 for body in bodies)
    compared = sum(check(server, body, got) for body, choices in zip(bodies, answers, strict=True) for got in choices)
    assert compared > 1000
    residual_after = residual_metric(server)
    for critic in server.critics:
        wanted = [
            residual
            for body, choices in zip(bodies, answers, strict=True)
            if body["guidance"].get("critic") == critic
            for got in choices
            for residual in residuals(server, body, got)
        ]
        grown = {part: residual_after[part][critic] - residual_before[part][critic] for part in ("sum", "count")}
        assert grown == {"sum": pytest.approx(sum(wanted), rel=1e-9), "count": len(wanted)}, critic
        assert len(wanted) > 20, critic


@pytest.mark.skipif(len(os.sched_getaffinity(0)) != 2, reason="vLLM gives its worker one core of two")
def test_critics_run_on_the_core_that_the_reference_leaves_over(server: Server) -> None:
    """What the tests around this one compare was computed there."""
    body = {"model": "tiny", "prompt": [5, 6, 7], "eta": 0.1, "guidance": {"critic": "fast"}, "max_tokens": 2}
    httpx.post(f"{server.url}/v1/completions", json=body).raise_for_status()
    port = httpx.URL(server.url).port
    (front,) = {
        connection.pid
        for connection in psutil.net_connections("tcp4")
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
    }
    descendants = psutil.Process(front).children(recursive=True)
    (worker,) = (process for process in descendants if "Worker" in process.name())
    own = os.sched_getaffinity(worker.pid)
    threads = [os.sched_getaffinity(thread.id) for thread in worker.threads()]
    assert len(own) == 1
    assert [cores for cores in threads if cores != own] == [os.sched_getaffinity(0) - own]


@pytest.mark.v2
def test_every_field_of_every_token_on_the_v2_runner(server_v2: Server) -> None:
    rng = random.Random(8)
    bodies = requests(server_v2, rng, longest=120, tokens=40)
    before = preemptions(server_v2)
    answers = asyncio.run(run_all(server_v2, bodies, at_once=8))
    assert preemptions(server_v2) > before
    compared = sum(
        check(server_v2, body, got) for body, choices in zip(bodies, answers, strict=True) for got in choices
    )
    assert compared > 250


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("eta", [0.15, None])
def test_sampled_tokens_follow_pi(server: Server, temperature: float, eta: float | None) -> None:
    rng = random.Random(11)
    prompt = prompt_ids(rng, 30)
    bodies = [
        {
            "model": "tiny",
            "prompt": prompt,
            "temperature": temperature,
            "max_tokens": 1,
            "n": 50,
            "seed": 1000 * i,
            "stream": False,
            "eta": eta,
            "guidance": {"detail": "tokens"},
        }
        for i in range(48)
    ]
    answers = asyncio.run(run_all(server, bodies, at_once=4))
    counts = [0] * models.VOCAB
    for choices in answers:
        for got in choices:
            counts[got["tokens"][0]["token_id"]] += 1
    draws = sum(counts)
    assert draws == 2400
    critic = server.critics["plain"] if eta is not None else None
    pi = oracle.completion(server.reference, critic, prompt, [5], eta=eta, temperature=temperature)[0].pi
    assert eta is None or not math.isclose(pi.max().item(), pi.min().item())
    usual = [i for i in range(models.VOCAB) if pi[i] * draws >= 5]
    observed = [counts[i] for i in usual]
    expected = [pi[i].item() * draws for i in usual]
    if len(usual) < models.VOCAB:
        observed.append(draws - sum(observed))
        expected.append(max(draws - sum(expected), 1e-9))
    assert len(expected) > 5
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3
    if eta is not None:  # the test would notice the reference
        ref = oracle.completion(server.reference, None, prompt, [5], eta=None, temperature=temperature)[0].pi
        unguided = [ref[i].item() * draws for i in usual]
        assert stats.chisquare(observed[: len(usual)], unguided, sum_check=False).pvalue < 1e-6
