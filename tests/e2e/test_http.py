"""The server as its users see it: the `openai` client, wrong requests, critics that come and go."""

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import ADMIN_KEY, Server
from tests.support import models, oracle

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
PROMPT = list(range(20, 40))


def extra(choice: Any) -> dict[str, Any]:
    """Our field of a choice, as the client's models keep it."""
    found = choice.model_extra["guidance"]
    assert isinstance(found, dict)
    return found


# -- the openai client


def test_completions(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt="What is 1 + 2?", max_tokens=8, n=2, extra_body={"eta": 0.1})
    assert [choice.index for choice in made.choices] == [0, 1]
    for choice in made.choices:
        got = extra(choice)
        assert got.keys() == {"eta", "critic", "kl", "value", "tokens_guided", "tokens_total"}
        assert got["eta"] == 0.1
        assert got["critic"] == "plain@1"
        assert got["kl"] > 0
        assert 0 < got["tokens_guided"] <= got["tokens_total"] <= 8
    assert made.usage is not None
    assert made.usage.completion_tokens == sum(extra(c)["tokens_total"] for c in made.choices)


def test_completions_streaming(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="tiny", prompt="Hello", max_tokens=8, n=3, stream=True, extra_body={"eta": 0.1, "ignore_eos": True}
        )
    )
    last = {c.choices[0].index: extra(c.choices[0]) for c in chunks if c.choices and c.choices[0].finish_reason}
    assert last.keys() == {0, 1, 2}
    assert all(got["tokens_total"] == 8 for got in last.values())
    assert len({got["kl"] for got in last.values()}) == 3  # samples of their own


def test_several_prompts_in_one_request(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="tiny", prompt=["Hello", "What is 3?"], max_tokens=4, n=2, extra_body={"eta": 0.1, "ignore_eos": True}
    )
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    values = [extra(choice)["value"] for choice in made.choices]
    assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert values[2] == pytest.approx(values[3], abs=1e-4)
    assert abs(values[0] - values[2]) > 1e-3


def test_chat(client: openai.OpenAI, server: Server) -> None:
    made = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "What is 1 + 2?"}],
        max_tokens=10,
        n=2,
        extra_body={"eta": 0.2, "guidance": {"detail": "tokens", "tail": "keep"}, "return_token_ids": True},
    )
    assert made.model_extra is not None
    for choice in made.choices:
        got = extra(choice)
        tokens = [entry["token_id"] for entry in got["tokens"]]
        wanted = oracle.completion(
            server.reference,
            server.critics["plain"],
            made.model_extra["prompt_token_ids"],
            tokens,
            eta=0.2,
            tail="keep",
        )
        assert got["kl"] == pytest.approx(sum(w.kl for w in wanted), abs=5e-3)


def test_chat_streaming(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"eta": 0.2, "ignore_eos": True},
    )
    chunks = list(stream)
    guided = [extra(c.choices[0]) for c in chunks if c.choices and c.choices[0].finish_reason]
    assert [got["tokens_total"] for got in guided] == [6]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


def test_without_eta_it_is_plain_vllm(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    made = client.completions.create(**asked)
    assert extra(made.choices[0]) == {
        "eta": None,
        "critic": None,
        "kl": 0,
        "value": None,
        "tokens_guided": 0,
        "tokens_total": made.usage.completion_tokens if made.usage else 0,
    }
    again = client.completions.create(**asked, extra_body={"eta": None})
    assert again.choices[0].text == made.choices[0].text
    silent = client.completions.create(**asked, extra_body={"guidance": {"detail": "none"}})
    assert silent.choices[0].text == made.choices[0].text
    assert "guidance" not in (silent.choices[0].model_extra or {})


def test_logprobs_are_the_references_also_when_guided(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="tiny",
        prompt="Hello",
        max_tokens=8,
        logprobs=1,
        extra_body={"eta": 0.1, "guidance": {"detail": "tokens"}},
    )
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx(
        [entry["ref_logprob"] for entry in extra(made.choices[0])["tokens"]], abs=1e-4
    )


def test_structured_output_and_guidance_together(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="tiny",
        prompt="Pick",
        max_tokens=8,
        extra_body={"eta": 0.1, "structured_outputs": {"choice": ["red", "blue"]}, "guidance": {"detail": "tokens"}},
    )
    assert made.choices[0].text in ("red", "blue")
    # Where the grammar leaves one token there is nothing to guide.
    assert extra(made.choices[0])["tokens_guided"] < extra(made.choices[0])["tokens_total"]


# -- wrong requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"eta": 0}, "eta"),
        ({"eta": -0.1}, "eta"),
        ({"eta": 1e9}, "eta"),
        ({"eta": "0.1"}, "eta"),
        ({"eta": True}, "eta"),
        ({"eta": [0.1]}, "eta"),
        ({"eta": 0.1, "guidance": {"candidates": 0}}, "guidance.candidates"),
        ({"eta": 0.1, "guidance": {"candidates": 65}}, "guidance.candidates"),
        ({"eta": 0.1, "guidance": {"candidates": 2.5}}, "guidance.candidates"),
        ({"eta": 0.1, "guidance": {"min_prob": -1}}, "guidance.min_prob"),
        ({"eta": 0.1, "guidance": {"min_prob": "0"}}, "guidance.min_prob"),
        ({"eta": 0.1, "guidance": {"tail": "cut"}}, "guidance.tail"),
        ({"eta": 0.1, "guidance": {"method": "dpo"}}, "guidance.method"),
        ({"eta": 0.1, "guidance": {"detail": "all"}}, "guidance.detail"),
        ({"eta": 0.1, "guidance": {"critic": "nobody"}}, "guidance.critic"),
        ({"eta": 0.1, "guidance": {"critic": "plain@9"}}, "guidance.critic"),
        ({"eta": 0.1, "guidance": {"strength": 1}}, "guidance.strength"),
        ({"eta": 0.1, "guidance": "strong"}, "guidance"),
        ({"eta": 0.1, "presence_penalty": 1.0}, "presence_penalty"),
        ({"eta": 0.1, "repetition_penalty": 1.2}, "repetition_penalty"),
        ({"eta": 0.1, "use_beam_search": True, "n": 2}, "use_beam_search"),
    ],
)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_a_wrong_value_is_400_and_names_the_field(
    http: httpx.Client, route: str, fields: dict[str, Any], param: str
) -> None:
    asked = {"prompt": "x"} if route == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    answer = http.post(route, json={"model": "tiny", "max_tokens": 4, **asked, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    assert error["param"] == param
    assert param.split(".")[-1] in error["message"]


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_400(http: httpx.Client, literal: str) -> None:
    body = f'{{"model": "tiny", "prompt": "x", "max_tokens": 4, "eta": {literal}}}'
    answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "eta"


@pytest.mark.parametrize("route", ["/v1/systemone", "/generative_scoring"])
def test_eta_is_refused_where_it_would_be_ignored(http: httpx.Client, route: str) -> None:
    answer = http.post(route, json={"model": "tiny", "input": "x", "eta": 0.1})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "eta"


def test_a_request_longer_than_the_critic_is_400(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, "max_tokens": 600, "eta": 0.1})
    assert answer.status_code == 400


def test_seeded_long_prompts_do_not_end_the_engine(http: httpx.Client) -> None:
    # vLLM on CPU: a seeded request that is prefilled in chunks killed the engine (see upstream.spare_cpu_generators_v1)
    asked = {"model": "tiny", "prompt": [30] * 200, "max_tokens": 8, "seed": 5, "temperature": 1.0}
    first = http.post("/v1/completions", json=asked)
    assert first.status_code == 200, first.text
    assert http.post("/v1/completions", json=asked).json()["choices"][0]["text"] == first.json()["choices"][0]["text"]


def test_the_engine_survives_a_critic_whose_scores_overflow(http: httpx.Client, server: Server) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = models.write_critic(server.root / "broken", name="broken")
    head = load_file(folder / "head.safetensors")
    head["weight"] = torch.full_like(head["weight"], 3e38)
    save_file(head, folder / "head.safetensors")
    assert http.post("/v1/critics", json={"path": str(folder)}, headers=ADMIN).status_code == 200
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 50, "eta": 0.1, "guidance": {"critic": "broken"}}
    answer = http.post("/v1/completions", json={**asked, "ignore_eos": True})
    assert answer.status_code == 500, answer.text
    assert "critic" in answer.json()["error"]["message"]
    with http.stream("POST", "/v1/completions", json={**asked, "stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("data: {")]
    assert "error" in json.loads(lines[-1].removeprefix("data: "))
    assert 'qsharp_critic_failures_total{reason="not_finite"}' in http.get("/metrics").text
    good = http.post("/v1/completions", json={**asked, "guidance": {"critic": "plain"}})
    assert good.status_code == 200
    assert http.delete("/v1/critics/broken/1", headers=ADMIN).status_code == 200


# -- critics


def test_critics_are_listed(http: httpx.Client, server: Server) -> None:
    listed = {entry["name"]: entry for entry in http.get("/v1/critics").json()["data"]}
    assert listed.keys() >= server.critics.keys()
    assert listed["plain"]["default"]
    assert not listed["wide"]["default"]
    assert listed["wide"]["version"] == "1"


def test_admin_routes_want_the_admin_key(http: httpx.Client, server: Server) -> None:
    body = {"path": str(server.critics["plain"])}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ADMIN_KEY}):
        assert http.post("/v1/critics", json=body, headers=headers).status_code in (401, 403)
        assert http.post("/v1/critics/plain/activate", json={"version": "1"}, headers=headers).status_code in (401, 403)
        assert http.delete("/v1/critics/plain/1", headers=headers).status_code in (401, 403)


def test_a_critic_that_cannot_be_loaded_is_400(http: httpx.Client, server: Server) -> None:
    answer = http.post("/v1/critics", json={"path": str(server.root / "nothing")}, headers=ADMIN)
    assert answer.status_code == 400, answer.text
    assert "critic.json" in answer.json()["error"]["message"]
    again = http.post("/v1/critics", json={"path": str(server.critics["plain"])}, headers=ADMIN)
    assert again.status_code in (400, 409)


def test_scores_are_the_critics_expected_rewards(http: httpx.Client, server: Server) -> None:
    for name in ("plain", "both"):
        completion = list(range(50, 60))
        answer = http.post(f"/v1/critics/{name}/score", json={"prompt": PROMPT, "completion": completion})
        assert answer.status_code == 200, answer.text
        got = answer.json()["data"][0]["values"]
        card = json.loads((server.critics[name] / "critic.json").read_text())
        for t, token in enumerate(completion):
            outputs = oracle.critic_outputs(server.critics[name], PROMPT + completion[:t], [token])
            wanted = (oracle.probabilities(card, outputs) @ oracle.atoms(card)).item()
            assert got[t] == pytest.approx(wanted, abs=1e-4)


async def _stream(client: httpx.AsyncClient, started: asyncio.Event, body: dict[str, Any]) -> dict[str, Any]:
    guidance: dict[str, Any] = {}
    async with client.stream("POST", "/v1/completions", json=body) as stream:
        assert stream.status_code == 200
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                started.set()
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                guidance = choice.get("guidance", guidance)
    return guidance


def test_a_critic_is_swapped_under_load(server: Server) -> None:
    """16 streams run; a version is loaded, activated and the old one unloaded: all finish with what they began."""
    first = models.write_critic(server.root / "swap1", name="swap", version="1", seed=21)
    second = models.write_critic(server.root / "swap2", name="swap", version="2", seed=22)
    body = {
        "model": "tiny", "max_tokens": 120, "ignore_eos": True, "stream": True, "eta": 0.2,
        "guidance": {"critic": "swap", "detail": "tokens"},
    }  # fmt: skip

    async def run() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:

            async def admin(method: str, path: str, **kwargs: Any) -> None:
                answer = await client.request(method, path, headers=ADMIN, **kwargs)
                assert answer.status_code in (200, 202), answer.text

            await admin("POST", "/v1/critics", json={"path": str(first)})
            events = [asyncio.Event() for _ in range(16)]
            old = [
                asyncio.create_task(_stream(client, e, {**body, "prompt": [40 + i] * 20})) for i, e in enumerate(events)
            ]
            await asyncio.gather(*(event.wait() for event in events))
            await admin("POST", "/v1/critics", json={"path": str(second)})
            await admin("POST", "/v1/critics/swap/activate", json={"version": "2"})
            await admin("DELETE", "/v1/critics/swap/1")
            late = asyncio.Event()
            refused = await client.post(
                "/v1/completions",
                json={**body, "stream": False, "prompt": PROMPT, "guidance": {"critic": "swap@1"}},
            )
            assert refused.status_code == 400
            new = [asyncio.create_task(_stream(client, late, {**body, "prompt": PROMPT, "max_tokens": 8}))]
            return list(await asyncio.gather(*old)), list(await asyncio.gather(*new))

    old, new = asyncio.run(run())
    assert {got["critic"] for got in old} == {"swap@1"}
    assert {got["tokens_total"] for got in old} == {120}
    assert {got["critic"] for got in new} == {"swap@2"}
    for i, got in enumerate(old[:2]):  # and the scores are the old version's, to the last token
        tokens = [entry["token_id"] for entry in got["tokens"]]
        wanted = oracle.completion(server.reference, first, [40 + i] * 20, tokens, eta=0.2)
        for entry, want in zip(got["tokens"], wanted, strict=True):
            assert want.ambiguous or entry["kl"] == pytest.approx(want.kl, abs=5e-3)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        listed = httpx.get(f"{server.url}/v1/critics").json()["data"]
        if [e["version"] for e in listed if e["name"] == "swap"] == ["2"]:
            break
        time.sleep(0.2)
    else:
        pytest.fail(f"version 1 was not freed: {listed}")
    with httpx.Client(base_url=server.url, headers=ADMIN) as http:
        assert http.delete("/v1/critics/swap/2").status_code == 200


# -- the rest


def test_metrics(http: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    names = ["qsharp_guided_tokens_total", "qsharp_scored_candidates_total", "qsharp_token_kl_nats_sum"]
    before = [value(name) for name in names]
    answer = http.post(
        "/v1/completions",
        json={
            "model": "tiny", "prompt": PROMPT, "max_tokens": 10, "ignore_eos": True, "eta": 0.1,
            "guidance": {"candidates": 7},
        },
    )  # fmt: skip
    got = answer.json()["choices"][0]["guidance"]
    tokens, scored, kl = (value(name) - b for name, b in zip(names, before, strict=True))
    assert tokens == 10
    assert scored == 70
    assert kl == pytest.approx(got["kl"], abs=1e-6)
    text = http.get("/metrics").text
    for name in ("completion_kl_nats", "critic_step_seconds"):
        assert f"qsharp_{name}_count" in text
    assert "qsharp_completions_total{" in text
    assert 'qsharp_critic_info{name="plain",version="1"} 1.0' in text
    assert "qsharp_critic_kv_blocks_used" in text
    found, wanted = (value(f"qsharp_critic_prefix_{name}_total") for name in ("hit_tokens", "tokens"))
    assert 0 < found < wanted
    assert "vllm:num_requests_running" in text


def test_health(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/liveness").status_code == 200
    version = http.get("/version").json()
    assert "qsharp_serve" in version
    assert version["version"].startswith("0.32")


def test_cancelled_requests_leave_nothing_behind(server: Server) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            for _ in range(5):
                body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 300, "stream": True, "eta": 0.1, "n": 2}
                async with client.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as stream:
                    async for _line in stream.aiter_lines():
                        break

    asyncio.run(run())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        listed = httpx.get(f"{server.url}/v1/critics").json()["data"]
        if all(entry["users"] == 0 and entry["kv_blocks_used"] in (0, None) for entry in listed):
            return
        time.sleep(0.2)
    pytest.fail(f"still held: {listed}")
