"""Every reported number of every token, against plain transformers in float64."""

import asyncio
import itertools
import json
import math
import os
import random
from collections.abc import Sequence
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scipy import stats

from qsharp_core.wire.guidance import DEFAULT_MIN_PROB
from tests.conftest import Server
from tests.support import models, oracle

TOLERANCE = 5e-3
ETAS = [0.02, 0.1, 0.3, 1.0, 10.0]
BUDGETS = [1e-3, 0.03, 0.3, 2.0, 10.0]
METHODS = ["qsharp", "cd"]
TAILS = ["floor", "keep", "drop"]
# Each run draws requests of its own: `QSHARP_EXACT_RUNS=20 pytest tests/e2e/test_exact.py -k load` makes twenty.
RUNS = int(os.environ.get("QSHARP_EXACT_RUNS", "1"))


def prompt_ids(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(3, models.VOCAB) for _ in range(rng.randrange(2, longest))]


# Heads of these kinds want the most memory: of V heads each candidate, of the other the widest keys.
V_HEADS, WIDEST = ("plain", "wide", "deep"), ("fast",)


def requests(
    server: Server, rng: random.Random, count: int, longest: int, tokens: int, favourites: Sequence[str] = V_HEADS
) -> list[dict[str, Any]]:
    """Every combination of critic, method and tail, the other fields drawn; half of the rest for
    a favourite.
    """
    shared = prompt_ids(rng, longest)
    kinds = [*itertools.product(server.critics, METHODS, TAILS)]
    favourite = rng.choice([name for name in favourites if name in server.critics])
    while len(kinds) < count:
        critic = favourite if rng.random() < 0.5 else rng.choice([*server.critics])
        kinds.append((critic, rng.choice(METHODS), rng.choice(TAILS)))
    bodies: list[dict[str, Any]] = []
    for critic, method, tail in kinds:
        body: dict[str, Any] = {
            "eta": rng.choice(ETAS),
            "guidance": {
                "critic": critic,
                "method": method,
                "tail": tail,
                "detail": rng.choice(["tokens", "candidates"]),
            },
        }
        if critic == favourite and rng.random() < 0.6:  # so many that the rows of a step want more than there is
            body["guidance"] |= {"candidates": 64, "min_prob": 0}
        else:
            if rng.random() < 0.8:
                body["guidance"]["candidates"] = rng.choice([1, 2, 5, 33, 64])
            if rng.random() < 0.7:
                body["guidance"]["min_prob"] = rng.choice([0, 0, 0.01, 0.05, 0.2])
        for budget in ("kl_total", "kl_token"):
            if rng.random() < 0.3:
                body["guidance"][budget] = rng.choice(BUDGETS)
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
            "max_tokens": rng.randrange(2, tokens),
            "n": rng.choice([1, 1, 1, 2, 3, 4]),
            "stream": rng.random() < 0.5,
            "ignore_eos": rng.random() < 0.7,
            "seed": rng.randrange(2**31),
        }
        if body["temperature"] == 0:
            body["n"] = 1
    rng.shuffle(bodies)
    return bodies


def burst(rng: random.Random) -> list[dict[str, Any]]:
    """Eight rows whose steps have to be split: for candidates' memory on V1, on V2 for the cache.

    A token of `deep` takes the most memory of all critics.
    """
    return [
        {
            "model": "tiny",
            "prompt": prompt_ids(rng, 12),
            "temperature": 1.0,
            "max_tokens": 6,
            "n": 1,
            "stream": False,
            "ignore_eos": True,
            "seed": rng.randrange(2**31),
            "eta": rng.choice(ETAS),
            "guidance": {"critic": "deep", "detail": "tokens", "candidates": 64, "min_prob": 0},
        }
        for _ in range(8)
    ]


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
        **{name: options[name] for name in ("kl_total", "kl_token") if name in options},
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
        assert (entry["strength"] < 1) == (want.strength < 1) or abs(want.strength - 1) < 1e-2, where
        assert ("candidates" in entry) == (options["detail"] == "candidates"), where
        if "candidates" in entry:
            check_candidates(entry["candidates"], want)
    assert got["kl"] == pytest.approx(sum(entry["kl"] for entry in got["tokens"]), abs=1e-6)
    check_budget(options, got)
    assert got["value"] == next((entry["value"] for entry in got["tokens"] if entry["value"] is not None), None)
    assert got["tokens_guided"] == sum(entry["value"] is not None for entry in got["tokens"])
    assert got["eta"] == body["eta"]
    assert got["critic"] == (f"{options['critic']}@1" if body["eta"] is not None else None)
    return len(clear)


def check_candidates(got: dict[str, Any] | None, want: oracle.Expected) -> None:
    """What is reported of a step's candidates."""
    if want.outputs is None:
        assert got is None
        return
    assert got is not None
    ids = got["token_ids"]
    assert set(ids) == set(want.outputs)
    assert got["ref_logprobs"] == sorted(got["ref_logprobs"], reverse=True)
    assert got["ref_logprobs"] == pytest.approx(want.log_ref[ids].tolist(), abs=TOLERANCE)
    assert got["tail_mass"] == pytest.approx(1 - want.log_ref[ids].exp().sum().item(), abs=TOLERANCE)
    for token, outputs in zip(ids, got["outputs"], strict=True):
        assert outputs == pytest.approx(want.outputs[token].tolist(), abs=TOLERANCE, rel=1e-3), (token, outputs)
    assert len(got["texts"]) == len(ids)


def check_budget(options: dict[str, Any], got: dict[str, Any]) -> None:
    """A choice has spent no more than it might, and says so."""
    total, token = options.get("kl_total"), options.get("kl_token")
    clipped = sum(entry["strength"] < 1 for entry in got["tokens"])
    if total is None and token is None:
        assert not {"kl_budget", "steps_clipped"} & got.keys()
        assert clipped == 0
        return
    assert got["kl_budget"] == {"total": total, "token": token}
    assert got["steps_clipped"] == clipped
    if total is not None:
        assert got["kl"] <= total * (1 + 1e-12)
    if token is not None:
        assert max(entry["kl"] for entry in got["tokens"]) <= token


async def run_all(server: Server, bodies: list[dict[str, Any]], at_once: int) -> list[list[dict[str, Any]]]:
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        return await asyncio.gather(*(send(client, gate, body) for body in bodies))


def residuals(server: Server, body: dict[str, Any], got: dict[str, Any]) -> list[float]:
    """`|V(x') - V(x) - eta ln(pi/ref)|` of candidates, `x'` being where the critic was asked next."""
    options = {"method": "qsharp", "tail": "floor"} | body["guidance"]
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
        if token["strength"] == 1 and between >= 0.9 and (of_tail is None or abs(of_tail) > 1e-9):
            found.append(abs(got["tokens"][there]["value"] - token["value"] - gain))
    return found


def residual_metric(server: Server) -> dict[str, dict[str, float]]:
    """`sum` and `count` of the metric, by critic."""
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", follow_redirects=True).text)
    (family,) = (family for family in families if family.name == "qsharp_bellman_residual")
    found: dict[str, dict[str, float]] = {"sum": {}, "count": {}}
    for sample in family.samples:
        part = sample.name.removeprefix("qsharp_bellman_residual_")
        if part in found and sample.labels["name"] in server.critics:  # other tests load others
            assert sample.labels["version"] == "1"
            found[part][sample.labels["name"]] = sample.value
    return found


def metric(server: Server, name: str) -> float:
    """The sum of a metric's series."""
    lines = httpx.get(f"{server.url}/metrics", follow_redirects=True).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


LIMITS = {"vllm:num_preemptions_total": "requests preempted", "qsharp_critic_split_passes_total": "steps split"}
AUDITS = ("qsharp_audited_rows_total", "qsharp_audit_failures_total")


def compare(
    server: Server, count: int, longest: int, tokens: int, at_once: int, favourites: Sequence[str] = V_HEADS
) -> int:
    """Sends requests all at once and compares every token; returns how many. Every limit must have been passed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    bodies = burst(rng) + requests(server, rng, count, longest, tokens, favourites)
    before, residuals_before = {name: metric(server, name) for name in (*LIMITS, *AUDITS)}, residual_metric(server)
    answers = asyncio.run(run_all(server, bodies, at_once))
    for name, what in LIMITS.items():
        assert metric(server, name) > before[name], f"memory was to be so small that there are {what}"
    # The server's own comparison, of rows drawn at random.
    assert metric(server, "qsharp_audited_rows_total") > before["qsharp_audited_rows_total"]
    assert metric(server, "qsharp_audit_failures_total") == before["qsharp_audit_failures_total"]
    check_residuals(server, bodies, answers, residuals_before)
    return sum(check(server, body, got) for body, choices in zip(bodies, answers, strict=True) for got in choices)


def check_residuals(
    server: Server,
    bodies: list[dict[str, Any]],
    answers: list[list[dict[str, Any]]],
    before: dict[str, dict[str, float]],
) -> None:
    """The metric has grown by what follows from the responses."""
    after, count = residual_metric(server), 0
    for critic in server.critics:
        wanted = [
            residual
            for body, choices in zip(bodies, answers, strict=True)
            if body["guidance"].get("critic") == critic
            for got in choices
            for residual in residuals(server, body, got)
        ]
        grown = {part: after[part][critic] - before[part][critic] for part in ("sum", "count")}
        assert grown == {"sum": pytest.approx(sum(wanted), rel=1e-9, abs=1e-9), "count": len(wanted)}, critic
        count += len(wanted)
    assert count > 20


@pytest.mark.parametrize("run", range(RUNS))
def test_every_field_of_every_token_under_load(server: Server, run: int) -> None:
    compared = compare(server, 188, longest=120, tokens=32, at_once=16)
    print(f"{compared} tokens compared")
    assert compared > 3000


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
    # The critics' thread, and that of audits.
    assert [cores for cores in threads if cores != own] == [os.sched_getaffinity(0) - own] * 2


@pytest.mark.v2
def test_every_field_of_every_token_on_the_v2_runner(server_v2: Server) -> None:
    compared = compare(server_v2, 44, longest=140, tokens=40, at_once=8, favourites=WIDEST)
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
