"""Virtual models through HTTP: on every route that is guided, in whole responses and in streams, and what is stored."""

import json
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import Server
from tests.e2e.conftest import DEFAULT_ETA
from tests.e2e.test_elsewhere import CHAT, REQUESTS, reports

NAME = "tiny@eta=0.5@critic=native"
SUFFIXES = {"bad eta": ("@eta=0", 400), "no such critic": ("@eta=0.1@critic=nobody", 404), "neither": ("@tail=x", 404)}


@pytest.mark.parametrize("path", REQUESTS)
def test_a_name_guides_on_every_route_and_comes_back(other: str, path: str) -> None:
    with httpx.Client(base_url=other, timeout=120) as http:
        for name, eta in ((NAME, 0.5), ("tiny@critic=native", DEFAULT_ETA)):
            response = http.post(path, json={"model": name, **REQUESTS[path]})
            assert response.status_code == 200, response.text
            payload = response.json()
            assert payload["model"] == name
            assert {(one["eta"], one["critic"].split("@")[0]) for one in reports(payload)} == {(eta, "native")}
        response = http.post(path, json={"model": "tiny@eta=null", **REQUESTS[path]})
        assert all(one["eta"] is None for one in reports(response.json()))
        assert http.post(path, json={"model": "tiny", **REQUESTS[path]}).json()["model"] == "tiny"


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("case", SUFFIXES)
def test_a_wrong_name_is_refused_on_every_route(other: str, path: str, case: str) -> None:
    suffix, status = SUFFIXES[case]
    response = httpx.post(other + path, json={"model": f"tiny{suffix}", **REQUESTS[path]}, timeout=60)
    assert response.status_code == status, response.text
    if path != "/v1/messages" or status == 400:  # of a model that it does not know it answers in Anthropic's form
        assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize("path", REQUESTS)
def test_name_and_field_must_agree_on_every_route(other: str, path: str) -> None:
    response = httpx.post(other + path, json={"model": NAME, "eta": 0.4, **REQUESTS[path]}, timeout=60)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "eta"
    assert httpx.post(other + path, json={"model": NAME, "eta": 0.5, **REQUESTS[path]}, timeout=60).is_success


def test_the_openai_client_needs_a_name_and_nothing_else(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        names = [model.id for model in client.models.list()]
        assert names[0] == "tiny"
        assert {"tiny@eta=0.1", "tiny@eta=0.1@critic=native"} <= set(names)
        chat = client.chat.completions.create(model="tiny@eta=0.1", messages=CHAT, max_tokens=5)  # type: ignore[arg-type]
        assert chat.model == "tiny@eta=0.1"
        guidance: Any = chat.choices[0].model_extra
        assert guidance["guidance"]["eta"] == 0.1
        chunks = list(client.completions.create(model=NAME, prompt="abc", max_tokens=5, stream=True))
        assert {chunk.model for chunk in chunks} == {NAME}
        last: Any = next(c.choices[0] for c in chunks if c.choices and c.choices[0].finish_reason).model_extra
        assert last["guidance"]["critic"] == "native@1"


def test_it_samples_as_with_the_field(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=120) as http:
        texts = [
            http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 12, "seed": 3, **how}).json()["choices"][
                0
            ]
            for how in ({"model": "tiny", "eta": 0.05}, {"model": "tiny@eta=0.05"}, {"model": "tiny"})
        ]
    assert texts[0]["text"] == texts[1]["text"] != texts[2]["text"]
    assert texts[0]["guidance"] == texts[1]["guidance"]


@pytest.mark.parametrize("stream", [False, True])
def test_rollouts_have_the_models_own_name(server: Server, stream: bool) -> None:
    with httpx.Client(base_url=server.url, timeout=120) as http:
        body = {"model": NAME, "messages": CHAT, "max_tokens": 4, "store": True, "stream": stream}
        response = http.post("/v1/chat/completions", json=body)
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
        events = [json.loads(line) for line in lines] if stream else [response.json()]
        (ended,) = [choice for event in events for choice in event["choices"] if "rollout_id" in choice]
        assert {event["model"] for event in events} == {NAME}
        rollout = http.get(f"/v1/rollouts/{ended['rollout_id']}").json()
        assert (rollout["model"], rollout["eta"], rollout["critic"]) == ("tiny", 0.5, "native@1")
        assert http.get(f"/v1/chat/completions/{events[0]['id']}").json()["model"] == "tiny"


def test_log_likelihoods_are_the_references_whatever_the_default(server: Server, other: str) -> None:
    """As lm-evaluation-harness asks for them, of both kinds of servers and by all names."""
    body = {"prompt": "What is 1 + 2?", "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1}
    answers = [
        httpx.post(f"{url}/v1/completions", json={"model": name, **body}, timeout=60).json()
        for url, name in ((server.url, "tiny"), (other, "tiny"), (server.url, NAME), (other, NAME))
    ]
    plain = answers[0]["choices"][0]
    for answer in answers:
        (choice,) = answer["choices"]
        assert "guidance" not in choice or choice["guidance"]["eta"] is None
        assert choice["text"] == plain["text"]
        assert choice["logprobs"]["tokens"] == plain["logprobs"]["tokens"]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
            plain["logprobs"]["token_logprobs"][1:], abs=1e-4
        )


def test_routes_that_do_not_sample_take_the_names_too(other: str) -> None:
    with httpx.Client(base_url=other, timeout=60) as http:
        for path, body in (
            ("/tokenize", {"prompt": "abc"}),
            ("/v1/messages/count_tokens", {"messages": CHAT}),
            ("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [1, 2]}),
        ):
            plain, named = (http.post(path, json={"model": name, **body}) for name in ("tiny", NAME))
            assert plain.status_code == named.status_code == 200, named.text
