"""Two engines behind one HTTP server, on its host or one of them on another: what is reported stays exact, and nothing
is lost.

The other host is a process of its own (`--headless`), which reaches the server's at an address of the network.
"""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ADMIN_KEY, Server, flags
from tests.e2e.test_exact import check, requests, run_all
from tests.support import models
from tests.support.waiting import within
from trainer.serving import free_port, serve

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
ENGINES = ["0", "1"]
HEAD = "127.0.0.2"  # of the host that has the HTTP server


@contextmanager
def second_host(arguments: list[str], log: Path) -> Iterator[list[str]]:
    """Runs the second engine alone, and gives the flags of the server that it is for."""
    shared = [
        "--data-parallel-size",
        "2",
        "--data-parallel-address",
        HEAD,
        "--data-parallel-rpc-port",
        str(free_port(HEAD)),
    ]
    alone = ["--headless", "--data-parallel-size-local", "1", "--data-parallel-start-rank", "1"]
    command = [str(Path(sys.executable).parent / "qsharp"), "serve", *arguments, *shared, *alone]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        yield [*shared, "--data-parallel-size-local", "1"]
        if process.poll() is None:  # else a test has killed it
            process.terminate()
            assert process.wait(30) == 0, log.read_text(errors="replace")[-4000:]


@pytest.fixture(scope="module", params=["one host", "two hosts"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("dp")
    reference = models.write_reference(root / "reference")
    critics = {
        "plain": models.write_critic(root / "plain", name="plain", seed=1),
        "fast": models.write_critic(root / "fast", kind="qwen2", head="Q", name="fast", seed=3),
    }
    arguments = flags(reference, critics, rows=8, blocks=24)
    with ExitStack() as stack:
        if request.param == "one host":
            more = ["--data-parallel-size", "2"]
        else:
            more = stack.enter_context(second_host(arguments, root / "second-host.log"))
        url = stack.enter_context(serve([*arguments, *more], root / "log"))
        yield Server(url, reference, critics, root, root / "log")


def scrape(server: Server) -> dict[str, dict[str, float]]:
    """Samples by name: their value by the label `engine`, summed over the others ("" where there is none)."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics", follow_redirects=True).text):
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            engine = sample.labels.get("engine", "")
            values[engine] = values.get(engine, 0.0) + sample.value
    return found


def grown(server: Server, before: dict[str, dict[str, float]], name: str) -> float:
    return scrape(server)[name][""] - before.get(name, {}).get("", 0.0)


def test_every_token_and_every_sum_is_exact(server: Server) -> None:
    bodies = requests(server, random.Random(21), count=40, longest=100, tokens=32)
    before = scrape(server)
    answers = asyncio.run(run_all(server, bodies, at_once=16))
    compared = sum(check(server, body, got) for body, choices in zip(bodies, answers, strict=True) for got in choices)
    assert compared > 300

    served = scrape(server)["vllm:request_success_total"]
    assert [served[engine] > before["vllm:request_success_total"].get(engine, 0) for engine in ENGINES] == [True, True]
    choices = [got for each in answers for got in each]
    guided = [got for got in choices if got["eta"] is not None]
    tokens = [entry for got in guided for entry in got["tokens"] if entry["value"] is not None]
    assert grown(server, before, "qsharp_completions_total") == len(choices)
    assert grown(server, before, "qsharp_guided_tokens_total") == len(tokens)
    assert grown(server, before, "qsharp_token_kl_nats_count") == len(tokens)
    assert grown(server, before, "qsharp_completion_kl_nats_count") == len(guided)
    total = sum(got["kl"] for got in guided)
    assert grown(server, before, "qsharp_completion_kl_nats_sum") == pytest.approx(total, rel=1e-9)
    # Every step scores its candidates, also those whose sample a preemption threw away.
    assert grown(server, before, "qsharp_scored_candidates_total") >= len(tokens)


def test_gauges_are_kept_apart_by_engine(server: Server) -> None:
    found = scrape(server)
    assert sorted(found["qsharp_engine_up"].items()) == [("0", 1.0), ("1", 1.0)]
    assert sorted(found["qsharp_critic_kv_blocks_used"]) == ENGINES
    deadline = time.monotonic() + 20
    while any(entry["users"] for entry in httpx.get(f"{server.url}/v1/critics").json()["data"]):
        assert time.monotonic() < deadline


def test_critics_come_and_go_in_all_engines(server: Server) -> None:
    models.write_critic(server.root / "plain-2", name="plain", version="2", seed=8)
    with httpx.Client(base_url=server.url, headers=ADMIN, timeout=120) as http:
        answer = http.post("/v1/critics", json={"path": str(server.root / "plain-2"), "activate": True})
        assert answer.status_code == 200, answer.text
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, "eta": 0.1, "ignore_eos": True}
        for _ in range(6):  # whichever engine serves it
            (choice,) = http.post("/v1/completions", json=body).json()["choices"]
            assert choice["guidance"]["critic"] == "plain@2"
            assert choice["guidance"]["tokens_guided"] == 4
        assert http.post("/v1/critics/plain/rollback").json()["version"] == "1"
        assert http.delete("/v1/critics/plain/2").status_code in (200, 202)
        deadline = time.monotonic() + 20
        while "plain@2" in [entry["id"] for entry in http.get("/v1/critics").json()["data"]]:
            assert time.monotonic() < deadline
    assert 'version="2"' not in httpx.get(f"{server.url}/metrics", follow_redirects=True).text


def test_a_lost_host_is_noticed(server: Server) -> None:
    """It comes last: nothing brings an engine back."""
    hosts = [child for child in psutil.Process().children() if "--headless" in child.cmdline()]
    if not hosts:
        pytest.skip("all engines are on the server's host")
    assert httpx.get(f"{server.url}/liveness", timeout=30).status_code == 200
    for process in [child for host in hosts for child in host.children(recursive=True)] + hosts:
        process.kill()
    within(60, lambda: httpx.get(f"{server.url}/liveness", timeout=30).status_code == 503)
    within(60, lambda: scrape(server)["qsharp_engine_up"] == {"0": 1.0, "1": 0.0})
