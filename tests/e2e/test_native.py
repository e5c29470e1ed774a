"""Critics on the reference's hidden states, as a running server's users see them; numbers: `test_exact.py`."""

import asyncio
import io
from typing import Any

import httpx
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from qsharp_core.wire.critics import CriticList
from server.commands import critics as critics_command
from tests.conftest import ADMIN_KEY, BUDGET, Server
from tests.e2e.test_exact import check, run_all
from tests.support import models, oracle

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
PROMPT = list(range(20, 40))


def asking(critic: str, prompt: list[int], **more: Any) -> dict[str, Any]:
    """A request whose answer `check` compares."""
    return {
        "model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 1.0, "ignore_eos": True, "stream": False,
        "n": 1, "eta": 0.1, "guidance": {"critic": critic, "detail": "tokens", "min_prob": 0}, **more,
    }  # fmt: skip


def test_it_is_described_without_a_cache(http: httpx.Client, server: Server) -> None:
    (shown,) = http.get("/v1/critics/native").json()["versions"]
    assert (shown["max_length"], shown["kv_blocks"], shown["kv_blocks_used"]) == (512, None, None)
    assert shown["card"]["backbone"] == "reference"
    assert shown["card"]["made_for"]["hidden_size"] == 64
    metrics = http.get("/metrics").text.splitlines()
    assert 'qsharp_critic_info{name="native",version="1"} 1.0' in metrics
    assert not [line for line in metrics if "kv_blocks" in line and 'name="native"' in line]
    out = io.StringIO()
    Console(file=out, width=300).print(
        critics_command._table(CriticList.model_validate_json(http.get("/v1/critics").content))
    )
    (line,) = [line for line in out.getvalue().splitlines() if "│ native" in line]
    assert [cell.strip() for cell in line.split("│")[1:7]] == ["native", "1", "active", "0", "none", "512"]


def test_it_scores_no_text(http: httpx.Client) -> None:
    answer = http.post("/v1/critics/native/score", json={"prompt": PROMPT, "completion": PROMPT})
    assert answer.status_code == 400
    assert "cannot score a text" in answer.json()["error"]["message"]


def test_a_cached_prompt_in_chunks_beside_log_probabilities_of_prompts(server: Server) -> None:
    """Logits are then computed of other rows, too, and the prompt's hidden states are not computed again."""
    prompt = [3 + i % 150 for i in range(3 * BUDGET)]
    first = asking("native", prompt)
    asyncio.run(run_all(server, [first], at_once=1))
    beside = [asking("plain", [*PROMPT, 60 + i], prompt_logprobs=1) for i in range(4)]
    others = [asking("uneven", [*prompt[:100], 60 + i], logprobs=2) for i in range(3)]
    bodies = [first, *beside, *others]
    answers = asyncio.run(run_all(server, bodies, at_once=8))
    assert [check(server, body, got) > 8 for body, (got,) in zip(bodies, answers, strict=True)] == [True] * 8


def test_it_replaces_a_separate_critic_under_load(server: Server) -> None:
    folders = [
        models.write_critic(server.root / "turn1", name="turn", version="1", seed=21),
        models.write_native_critic(server.root / "turn2", server.reference, name="turn", version="2", seed=22),
        models.write_native_critic(server.root / "turn3", server.reference, name="turn", version="3", seed=23),
    ]
    body = asking("turn", PROMPT, max_tokens=60)

    async def run() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300, headers=ADMIN) as client:

            async def ask() -> dict[str, Any]:
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                guidance: dict[str, Any] = answer.json()["choices"][0]["guidance"]
                return guidance

            tasks: list[asyncio.Task[dict[str, Any]]] = []
            for folder in folders:
                loaded = await client.post("/v1/critics", json={"path": str(folder), "activate": True})
                assert loaded.status_code == 200, loaded.text
                tasks += [asyncio.create_task(ask()) for _ in range(4)]
                await asyncio.sleep(0.3)
            for version in ("1", "2"):
                assert (await client.delete(f"/v1/critics/turn/{version}")).status_code in (200, 202)
            found = await asyncio.gather(*tasks)
            async with asyncio.timeout(30):
                while len((await client.get("/v1/critics/turn")).json()["versions"]) > 1:
                    await asyncio.sleep(0.2)
            assert (await client.delete("/v1/critics/turn/3")).status_code in (200, 202)
            return found

    for i, got in enumerate(asyncio.run(run())):
        assert got["critic"] == f"turn@{i // 4 + 1}"
        tokens = [entry["token_id"] for entry in got["tokens"]]
        wanted = oracle.completion(server.reference, folders[i // 4], PROMPT, tokens, eta=0.1, min_prob=0)
        for entry, want in zip(got["tokens"], wanted, strict=True):
            assert want.ambiguous or entry["kl"] == pytest.approx(want.kl, abs=5e-3)


def test_one_made_for_another_reference_is_refused(http: httpx.Client, server: Server) -> None:
    other = models.write_reference(server.root / "another", seed=77)
    folder = models.write_native_critic(server.root / "foreign", other, name="foreign")
    answer = http.post("/v1/critics", json={"path": str(folder)}, headers=ADMIN)
    assert answer.status_code == 400, answer.text
    assert "foreign@1 was made for another reference" in answer.json()["error"]["message"]


def test_outputs_that_are_not_finite_fail_their_requests_alone(http: httpx.Client, server: Server) -> None:
    folder = models.write_native_critic(server.root / "overflowing", server.reference, name="overflowing")
    head = load_file(folder / "head.safetensors")
    head["out.weight"] = torch.full_like(head["out.weight"], 3e38)
    save_file(head, folder / "head.safetensors")
    assert http.post("/v1/critics", json={"path": str(folder)}, headers=ADMIN).status_code == 200
    answer = http.post("/v1/completions", json=asking("overflowing", PROMPT))
    assert answer.status_code == 500, answer.text
    assert http.post("/v1/completions", json=asking("native", PROMPT)).status_code == 200
    assert http.delete("/v1/critics/overflowing/1", headers=ADMIN).status_code == 200
