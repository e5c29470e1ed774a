"""Stored completions over HTTP: what is kept, labels of roll-outs, OpenAI's routes, rewards, failures, kills."""

import asyncio
import io
import json
import os
import random
import signal
import sqlite3
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from server.store.filters import Filters
from server.store.rollouts import RolloutStore
from tests.conftest import ADMIN_KEY, Server
from tests.support import models
from tests.support.processes import process_of
from trainer.rollouts.branching import LISTED, listed_in_choice, listed_in_prompt, with_alternatives
from trainer.serving import serve

PROMPT = list(range(20, 40))
MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
]


@dataclass(frozen=True)
class Stored:
    """A server with a store, and the store's file."""

    url: str
    database: Path
    arguments: list[str]


def arguments(root: Path) -> list[str]:
    reference, critic = models.write_reference(root / "reference"), models.write_critic(root / "plain", name="plain")
    return [
        str(reference), "--critic", str(critic), "--served-model-name", "tiny", "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "50000000",
        "--enable-auto-tool-choice", "--tool-call-parser", "pythonic", "--admin-key", ADMIN_KEY,
        "--rollouts", f"sqlite:///{root / 'rollouts.db'}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    root = tmp_path_factory.mktemp("stored")
    given = arguments(root)
    with serve(given, root / "log") as url:
        yield Stored(url, root / "rollouts.db", given)


@pytest.fixture
def url(stored: Stored) -> str:
    return stored.url


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post(
        "/v1/completions", json={"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "store": True, **fields}
    )
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    return whole


def rollout(http: httpx.Client, choice: dict[str, Any]) -> dict[str, Any]:
    answer = http.get(f"/v1/rollouts/{choice['rollout_id']}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events(http: httpx.Client, route: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", route, json={"model": "tiny", "stream": True, **body}) as stream:
        assert stream.status_code == 200
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == status
    return error


# -- what is kept


def test_an_unguided_completion_is_kept_as_it_was_sampled(http: httpx.Client) -> None:
    before = time.time()
    made = complete(
        http, n=2, temperature=0.8, top_p=0.9, top_k=50, min_p=0.01, seed=7, stop=["zzz"], ignore_eos=True,
        return_token_ids=True, metadata={"task": "t", "é": "\n"},
    )  # fmt: skip
    for choice in made["choices"]:
        kept = rollout(http, choice)
        assert kept["request_id"] == made["id"]
        assert kept["choice"] == choice["index"]
        assert (kept["route"], kept["model"]) == ("completion", "tiny")
        assert before - 1 < kept["created"] < time.time()
        assert kept["prompt_token_ids"] == PROMPT
        assert kept["prompt_text"] == "123456789:;<=>?@ABCD"
        assert kept["completion_token_ids"] == choice["token_ids"]
        assert kept["completion_text"] == choice["text"]
        assert kept["sampling"] == {
            "temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 7 + choice["index"],
            "other": {"stop": ["zzz"], "max_tokens": 8, "ignore_eos": True},
        }  # fmt: skip
        assert kept["first_valid_position"] == 0
        names = ("eta", "method", "critic", "guidance", "parent_id", "cut", "value", "reward", "messages")
        assert {name: kept[name] for name in names} == dict.fromkeys(names)
        assert (kept["kl"], kept["finish_reason"]) == (0.0, "length")
        assert kept["metadata"] == {"task": "t", "é": "\n"}
        assert kept["rewards"] == []


def test_a_guided_completion_has_no_valid_position(http: httpx.Client) -> None:
    made = complete(
        http, eta=0.1, n=2, guidance={"method": "cd", "tail": "keep", "candidates": 7}, return_token_ids=True
    )
    for choice in made["choices"]:
        kept = rollout(http, choice)
        assert kept["first_valid_position"] is None
        assert (kept["eta"], kept["method"], kept["critic"]) == (0.1, "cd", "plain@1")
        assert kept["guidance"] == {"candidates": 7, "min_prob": 0.01, "tail": "keep"}
        assert kept["kl"] == choice["guidance"]["kl"]
        assert kept["value"] == choice["guidance"]["value"]
        assert kept["completion_token_ids"] == choice["token_ids"]


def test_several_prompts_and_no_detail(http: httpx.Client) -> None:
    made = complete(http, prompt=["Hello", "What?"], n=2, guidance={"detail": "none"})
    kept = [rollout(http, choice) for choice in made["choices"]]
    assert [k["choice"] for k in kept] == [0, 1, 2, 3]
    assert [k["prompt_text"] for k in kept] == ["Hello", "Hello", "What?", "What?"]
    assert [k["completion_text"] for k in kept] == [choice["text"] for choice in made["choices"]]
    assert "guidance" not in made["choices"][0]


@pytest.mark.parametrize("eta", [None, 0.1])
def test_streams_tell_the_rollout_with_the_finish_reason(http: httpx.Client, eta: float | None) -> None:
    body = {"prompt": "Hello", "max_tokens": 9, "n": 3, "store": True, "eta": eta, "return_token_ids": True}
    texts, tokens, ids = [""] * 3, [[], [], []], {}  # type: ignore[var-annotated]
    for event in events(http, "/v1/completions", body):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            tokens[choice["index"]] += choice["token_ids"]
            assert ("rollout_id" in choice) == (choice["finish_reason"] is not None)
            if choice["finish_reason"]:
                ids[choice["index"]] = choice
    for index, choice in ids.items():
        kept = rollout(http, choice)
        assert kept["completion_text"] == texts[index]
        assert kept["completion_token_ids"] == tokens[index]
        assert (kept["choice"], kept["eta"]) == (index, eta)
    assert ids.keys() == {0, 1, 2}


def test_a_stop_token_is_kept(http: httpx.Client) -> None:
    made = complete(http, max_tokens=200, allowed_token_ids=[50, 51, 52], stop_token_ids=[51], return_token_ids=True)
    kept = rollout(http, made["choices"][0])
    assert kept["finish_reason"] == "stop"
    assert kept["completion_token_ids"][-1] == 51
    assert kept["completion_token_ids"] == made["choices"][0]["token_ids"]
    assert kept["sampling"]["other"]["allowed_token_ids"] == [50, 51, 52]


def test_what_is_not_asked_to_be_stored_is_not(http: httpx.Client) -> None:
    def count() -> int:
        return pq.read_table(io.BytesIO(http.get("/v1/rollouts/export").content)).num_rows

    before = count()
    for store in (None, False):
        assert "rollout_id" not in complete(http, store=store, metadata={"a": "b"})["choices"][0]
    assert count() == before


# -- roll-in, roll-out


def test_a_roll_out_goes_on_from_a_guided_parent(http: httpx.Client) -> None:
    parent = rollout(http, complete(http, eta=0.05, max_tokens=12, ignore_eos=True)["choices"][0])
    for cut in (1, 7, 12):
        made = complete(
            http, n=2, prompt=PROMPT + parent["completion_token_ids"][:cut], max_tokens=6, return_token_ids=True,
            metadata={"qsharp_parent": parent["id"], "qsharp_cut": str(cut), "round": "1"},
        )  # fmt: skip
        for choice in made["choices"]:
            kept = rollout(http, choice)
            assert kept["prompt_token_ids"] == PROMPT
            assert kept["prompt_text"] == parent["prompt_text"]
            assert kept["completion_token_ids"] == parent["completion_token_ids"][:cut] + choice["token_ids"]
            assert (kept["parent_id"], kept["cut"]) == (parent["id"], cut)
            assert kept["first_valid_position"] == cut - 1
            assert (kept["eta"], kept["critic"], kept["kl"]) == (None, None, 0.0)
            assert kept["metadata"]["round"] == "1"
            assert kept["completion_text"].endswith(choice["text"])
            assert kept["completion_text"][: -len(choice["text"])] == "".join(
                models_text(token) for token in parent["completion_token_ids"][:cut]
            )


def test_a_branch_goes_on_from_a_token_that_was_forced(http: httpx.Client) -> None:
    parent = rollout(http, complete(http, max_tokens=12, ignore_eos=True)["choices"][0])
    for cut in (1, 5, 12):
        own = parent["completion_token_ids"]
        forced = (own[cut - 1] + 1) % models.VOCAB
        about = {"qsharp_parent": parent["id"], "qsharp_cut": str(cut), "qsharp_forced": str(forced)}
        beginning = [*own[: cut - 1], forced]
        made = complete(http, prompt=PROMPT + beginning, max_tokens=6, return_token_ids=True, metadata=about)
        kept = rollout(http, made["choices"][0])
        assert kept["prompt_token_ids"] == PROMPT
        assert kept["completion_token_ids"] == beginning + made["choices"][0]["token_ids"]
        assert (kept["parent_id"], kept["cut"], kept["first_valid_position"]) == (parent["id"], cut, cut - 1)
        assert kept["completion_text"].endswith(made["choices"][0]["text"])


@pytest.mark.parametrize("form", ["completion", "chat", "prompt"])
def test_what_else_the_reference_might_have_drawn_is_told(http: httpx.Client, stored: Stored, form: str) -> None:
    """What `qsharp collect --branch` reads of the server, against a plain forward pass."""
    asking: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "return_token_ids": True, "store": False}
    if form == "chat":
        asking |= {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], "eta": None, "seed": 3}
        answer = http.post("/v1/chat/completions", json=asking | with_alternatives(chat=True)).raise_for_status().json()
        prompt = answer["prompt_token_ids"]
    else:
        answer, prompt = (
            complete(http, **asking, **(with_alternatives(chat=False) if form == "completion" else {})),
            PROMPT,
        )
    (choice,) = answer["choices"]
    own = choice["token_ids"]
    if form == "prompt":
        (read,) = complete(http, prompt=prompt + own, max_tokens=1, prompt_logprobs=LISTED, store=False)["choices"]
        listed = listed_in_prompt(read["prompt_logprobs"], len(prompt))
    else:
        listed = listed_in_choice(choice)
    model = AutoModelForCausalLM.from_pretrained(stored.arguments[0], dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1]
    assert len(listed) == len(own)
    for one, row in zip(listed, logits, strict=True):
        log_ref = row.log_softmax(-1)
        # A chat's list has no room for the last one where an unlikelier token was drawn.
        sure = LISTED - (form == "chat")
        assert list(one.values())[:sure] == pytest.approx(log_ref.topk(sure).values.tolist(), abs=1e-3)
        # Not their order: two may be as likely to within the tolerance.
        assert list(one.values()) == pytest.approx(log_ref[list(one)].tolist(), abs=1e-3)


def models_text(token: int) -> str:
    """Of a token that is one character, or written as its number, in `tests.support.models`."""
    return models.CHARACTERS[token - 3] if token - 3 in range(len(models.CHARACTERS)) else f"<{token}>"


def test_a_roll_out_ends_at_its_own_stop_string(http: httpx.Client) -> None:
    parent = rollout(
        http, complete(http, eta=0.05, max_tokens=8, ignore_eos=True, allowed_token_ids=[50, 51])["choices"][0]
    )
    stop = models_text(51)
    made = complete(
        http, prompt=PROMPT + parent["completion_token_ids"], max_tokens=200, allowed_token_ids=[50, 51], stop=[stop],
        metadata={"qsharp_parent": parent["id"], "qsharp_cut": "8"},
    )  # fmt: skip
    kept = rollout(http, made["choices"][0])
    assert kept["finish_reason"] == "stop"
    assert kept["completion_token_ids"][-1] == 51
    assert kept["completion_text"] == parent["completion_text"] + made["choices"][0]["text"]


def test_inconsistent_parents_are_400_and_name_metadata(http: httpx.Client) -> None:
    parent = rollout(http, complete(http, eta=0.1, max_tokens=8, ignore_eos=True)["choices"][0])
    name, at_3 = parent["id"], PROMPT + parent["completion_token_ids"][:3]
    good = {"qsharp_parent": name, "qsharp_cut": "3"}
    wrong: list[dict[str, Any]] = [
        {"metadata": {"qsharp_parent": name}},
        {"metadata": {"qsharp_cut": "3"}},
        *({"metadata": {**good, "qsharp_cut": cut}} for cut in ("0", "9", "-1", "2.0", "x", "", "²", "1" * 5000)),
        {"metadata": {**good, "qsharp_cut": "2"}},
        {"metadata": {"qsharp_forced": "5"}},
        {"metadata": {**good, "qsharp_forced": str((at_3[-1] + 1) % models.VOCAB)}},
        {"metadata": {**good, "qsharp_forced": "x"}},
        {"metadata": {**good, "qsharp_parent": "rol_0"}},
        {"metadata": good, "prompt": at_3[:-1]},
        {"metadata": good, "prompt": [*at_3[:-1], (at_3[-1] + 1) % models.VOCAB]},
        {"metadata": good, "prompt": "Hello"},
        {"metadata": good, "prompt": [at_3, at_3]},
        {"metadata": good, "eta": 0.1},
        {"metadata": good, "truncate_prompt_tokens": 5},
    ]
    for fields in wrong:
        body = {"model": "tiny", "prompt": at_3, "max_tokens": 4, "store": True, **fields}
        error = error_of(http.post("/v1/completions", json=body), 400)
        assert error["param"] == "metadata", (fields, error)
        assert "metadata" in error["message"]
    chat = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "store": True, "metadata": good}
    assert error_of(http.post("/v1/chat/completions", json=chat), 400)["param"] == "metadata"
    assert complete(http, prompt=at_3, metadata=good)
    assert complete(http, prompt=[at_3], metadata=good)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"use_beam_search": True, "n": 2}, "use_beam_search"), ({"echo": True, "max_tokens": 0}, "max_tokens")],
)
def test_what_cannot_be_stored_is_refused(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4, "store": True, **fields}
    assert error_of(http.post("/v1/completions", json=body), 400)["param"] == param


def test_store_is_refused_where_it_would_be_ignored(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": [MESSAGES], "store": True}
    assert error_of(http.post("/v1/chat/completions/batch", json=body), 400)["param"] == "store"


# -- OpenAI's stored chat completions


@pytest.mark.parametrize("stream", [False, True])
def test_stored_chat_completions_are_what_was_answered(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": MESSAGES, "max_tokens": 8, "n": 2, "store": True, "logprobs": True,
        "metadata": {"who": "me"}, "extra_body": {"eta": 0.2, "ignore_eos": True},
    }  # fmt: skip
    contents = ["", ""]
    logprobs: list[list[Any]] = [[], []]
    ids = ["", ""]
    if stream:
        for chunk in client.chat.completions.create(**asked, stream=True):
            for part in chunk.choices:
                contents[part.index] += part.delta.content or ""
                logprobs[part.index] += part.logprobs.content if part.logprobs else []
                ids[part.index] = (part.model_extra or {}).get("rollout_id", "")
        name, created, model = chunk.id, chunk.created, chunk.model
    else:
        made = client.chat.completions.create(**asked)
        for choice in made.choices:
            contents[choice.index] = choice.message.content or ""
            logprobs[choice.index] = (choice.logprobs.content if choice.logprobs else None) or []
            ids[choice.index] = (choice.model_extra or {})["rollout_id"]
        name, created, model = made.id, made.created, made.model
    kept = client.chat.completions.retrieve(name)
    assert (kept.id, kept.created, kept.model, kept.metadata) == (name, created, model, {"who": "me"})
    assert [choice.message.content for choice in kept.choices] == contents
    assert [choice.message.role for choice in kept.choices] == ["assistant"] * 2
    assert [choice.finish_reason for choice in kept.choices] == ["length"] * 2
    assert [(choice.model_extra or {})["rollout_id"] for choice in kept.choices] == ids
    for choice, wanted in zip(kept.choices, logprobs, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.content == wanted
    assert kept.usage is not None
    assert kept.usage.completion_tokens == 16
    system, user = client.chat.completions.messages.list(name)
    assert (system.content, system.id) == ("Be brief.", f"{name}-0")
    assert user.content is None
    assert [part.model_dump(exclude_none=True) for part in user.content_parts or ()] == MESSAGES[1]["content"]


def test_stored_chat_completions_are_listed_updated_and_deleted(client: openai.OpenAI, http: httpx.Client) -> None:
    run = uuid.uuid4().hex
    names = []
    for i in range(3):
        made = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=3, store=True, metadata={"run": run, "i": str(i)}
        )
        names.append(made.id)
    listed = client.chat.completions.list(metadata={"run": run}, limit=2)
    assert [kept.id for kept in listed.data] == names[:2]
    assert [kept.id for kept in listed] == names  # over its pages
    assert [kept.id for kept in client.chat.completions.list(metadata={"run": run}, order="desc")] == names[::-1]
    assert not client.chat.completions.list(metadata={"run": run}, model="other").data
    updated = client.chat.completions.update(names[0], metadata={"new": "x"})
    assert updated.metadata == {"new": "x"}
    assert [kept.id for kept in client.chat.completions.list(metadata={"run": run})] == names[1:]
    one = client.chat.completions.retrieve(names[1]).choices[0].model_extra
    assert one is not None
    http.post(f"/v1/rollouts/{one['rollout_id']}/reward", json={"reward": 1})
    assert client.chat.completions.delete(names[1]).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(names[1])
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.delete(names[1])
    assert error_of(http.get(f"/v1/rollouts/{one['rollout_id']}"), 404)
    error = error_of(http.post(f"/v1/chat/completions/{names[2]}", json={"metadata": {"a": 1}}), 400)
    assert "metadata" in error["message"]
    assert error_of(http.get("/v1/chat/completions?after=chatcmpl-none"), 400)["param"] == "after"
    assert error_of(http.get("/v1/chat/completions?limit=101"), 400)["param"] == "limit"


def test_tool_calls_of_a_stream_are_kept_whole(http: httpx.Client) -> None:
    """A named tool makes vLLM constrain the output to its parameters and answer with a call."""
    tool = {
        "type": "function",
        "function": {"name": "pick", "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}},
                                                    "required": ["a"], "additionalProperties": False}},
    }  # fmt: skip
    body = {
        "messages": MESSAGES, "max_tokens": 60, "store": True, "tools": [tool], "temperature": 0,
        "tool_choice": {"type": "function", "function": {"name": "pick"}},
    }  # fmt: skip
    whole = http.post("/v1/chat/completions", json={"model": "tiny", **body}).json()
    streamed = events(http, "/v1/chat/completions", body)
    kept = [http.get(f"/v1/chat/completions/{name}").json() for name in (whole["id"], streamed[0]["id"])]
    calls = [k["choices"][0]["message"]["tool_calls"] for k in kept]
    for (call,) in calls:
        assert call.pop("id")
        assert call["function"]["name"] == "pick"
    assert calls[0] == calls[1]
    assert kept[1]["tools"] == [tool]


# -- rollouts and rewards


def test_rollouts_are_listed_with_filters(http: httpx.Client) -> None:
    run = uuid.uuid4().hex
    ids = [
        complete(http, eta=eta, metadata={"run": run, "i": str(i)})["choices"][0]["rollout_id"]
        for i, eta in enumerate([None, 0.1, None, 0.2])
    ]
    http.post(f"/v1/rollouts/{ids[3]}/reward", json={"reward": 0})

    def listed(query: str) -> list[str]:
        answer = http.get(f"/v1/rollouts?metadata.run={run}{query}")
        assert answer.status_code == 200, answer.text
        return [entry["id"] for entry in answer.json()["data"]]

    assert listed("") == ids
    assert listed("&guided=true") == [ids[1], ids[3]]
    assert listed("&critic=plain@1&has_reward=false") == [ids[1]]
    assert listed("&critic=plain&has_reward=true") == [ids[3]]
    assert listed("&metadata.i=2") == listed("&metadata[i]=2") == [ids[2]]
    page = http.get(f"/v1/rollouts?metadata.run={run}&limit=3&after={ids[0]}").json()
    assert [entry["id"] for entry in page["data"]] == ids[1:]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[1], ids[3], False)
    assert http.get(f"/v1/rollouts?metadata.run={run}&limit=3").json()["has_more"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"), ("limit=1001", "limit"), ("limit=x", "limit"), ("after=rol_0", "after"),
        ("guided=maybe", "guided"), ("has_reward=", "has_reward"), ("metadat.a=b", "metadat.a"), ("order=up", "order"),
        ("critic=a&critic=b", "critic"),
    ],
)  # fmt: skip
def test_wrong_queries_are_400(http: httpx.Client, query: str, param: str) -> None:
    error = error_of(http.get(f"/v1/rollouts?{query}"), 400)
    assert error["param"] == param
    assert param in error["message"]


def test_rewards_one_by_one(http: httpx.Client) -> None:
    name = complete(http)["choices"][0]["rollout_id"]
    path = f"/v1/rollouts/{name}/reward"
    given: list[tuple[dict[str, Any], bool, int]] = [
        ({"reward": 1, "source": "a"}, True, 1),
        ({"reward": 1.0}, False, 1),
        ({"reward": -2.5, "source": None}, True, 2),
    ]
    for body, changed, history in given:
        answer = http.post(path, json=body).json()
        assert (answer["id"], answer["reward"], answer["changed"]) == (name, body["reward"], changed)
        assert len(answer["rewards"]) == history
    kept = http.get(f"/v1/rollouts/{name}").json()
    assert kept["reward"] == -2.5
    assert [(entry["reward"], entry["source"]) for entry in kept["rewards"]] == [(1.0, "a"), (-2.5, None)]
    for literal in ('"1"', "true", "null", "NaN", "Infinity", "1e999", "[1]"):
        error = error_of(http.post(path, content=f'{{"reward": {literal}}}'), 400)
        assert error["param"] == "reward"
        assert "a finite number" in error["message"]
    assert error_of(http.post(path, json={}), 400)["param"] == "reward"
    assert error_of(http.post(path, json={"reward": 1, "source": 2}), 400)["param"] == "source"
    assert error_of(http.post(path, json={"reward": 1, "by": "me"}), 400)["param"] == "by"
    for content in ("", "[]", "{"):
        error_of(http.post(path, content=content), 400)
    error_of(http.post("/v1/rollouts/rol_0/reward", json={"reward": 1}), 404)
    error_of(http.get("/v1/rollouts/rol_0"), 404)


def test_rewards_in_batches_are_given_all_or_none(http: httpx.Client) -> None:
    ids = [choice["rollout_id"] for choice in complete(http, n=4)["choices"]]
    good = [{"id": name, "reward": i, "source": "s"} for i, name in enumerate(ids)]
    for wrong, param in [
        ({"id": "rol_0", "reward": 1}, "items[4].id"),
        ({"id": ids[0], "reward": "1"}, "items[4].reward"),
        ({"id": ids[0]}, "items[4].reward"),
        ({"reward": 1}, "items[4].id"),
        (7, "items[4]"),
    ]:
        error = error_of(http.post("/v1/rollouts/rewards", json={"items": [*good, wrong]}), 400)
        assert error["param"] == param
        assert [item["index"] for item in error["items"]] == [4]
    too_many = [good[0]] * 10_001
    bodies: list[dict[str, Any]] = [{}, {"items": []}, {"items": too_many}, {"items": good, "more": 1}, {"items": "x"}]
    for body in bodies:
        assert error_of(http.post("/v1/rollouts/rewards", json=body), 400)["param"] == "items"
    assert [http.get(f"/v1/rollouts/{name}").json()["reward"] for name in ids] == [None] * 4
    answer = http.post("/v1/rollouts/rewards", json={"items": good}).json()
    assert answer["data"] == [{"id": item["id"], "reward": item["reward"], "changed": True} for item in good]
    again = http.post("/v1/rollouts/rewards", json={"items": good}).json()
    assert not any(item["changed"] for item in again["data"])


def test_export_and_import(http: httpx.Client, tmp_path: Path) -> None:
    run = uuid.uuid4().hex
    ids = [choice["rollout_id"] for choice in complete(http, n=3, metadata={"run": run})["choices"]]
    http.post(f"/v1/rollouts/{ids[1]}/reward", json={"reward": 1})
    answer = http.get(f"/v1/rollouts/export?metadata.run={run}")
    assert answer.headers["content-type"] == "application/vnd.apache.parquet"
    table = pq.read_table(io.BytesIO(answer.content))
    assert table["id"].to_pylist() == ids
    assert table["reward"].to_pylist() == [None, 1.0, None]
    assert pq.read_table(io.BytesIO(http.get("/v1/rollouts/export?metadata.run=none").content)).num_rows == 0
    new = table.set_column(0, "id", [[*ids[:2], "rol_" + uuid.uuid4().hex]])
    pq.write_table(new, tmp_path / "r.parquet")
    body, admin = (tmp_path / "r.parquet").read_bytes(), {"Authorization": f"Bearer {ADMIN_KEY}"}
    result = {"object": "rollouts.import", "imported": 1, "skipped": 2}
    error_of(http.post("/v1/rollouts/import", content=body), 401)
    assert http.post("/v1/rollouts/import", content=body, headers=admin).json() == result
    assert http.post("/v1/rollouts/import", content=body, headers=admin).json() == {
        **result,
        "imported": 0,
        "skipped": 3,
    }
    assert len(http.get(f"/v1/rollouts?metadata.run={run}").json()["data"]) == 4
    wrong = table.set_column(table.column_names.index("kl"), "kl", [[0.0, 0.0, float("nan")]])
    wrong = wrong.set_column(0, "id", [[f"rol_{i}" for i in range(3)]])
    pq.write_table(wrong, tmp_path / "w.parquet")
    content = (tmp_path / "w.parquet").read_bytes()
    error = error_of(http.post("/v1/rollouts/import", content=content, headers=admin), 400)
    assert error["param"] == "kl"
    error_of(http.get("/v1/rollouts/rol_0"), 404)  # nothing of it was taken
    error_of(http.post("/v1/rollouts/import", content=b"nothing", headers=admin), 400)
    error_of(http.get("/v1/rollouts/export?limit=1"), 400)


def test_the_routes_are_documented(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert paths["/v1/chat/completions"].keys() == {"get", "post"}
    assert "/v1/chat/completions/batch" in paths  # vLLM's own stay
    assert "/v1/rollouts/{rollout_id}/reward" in paths


def test_metrics(http: httpx.Client) -> None:
    def values() -> list[float]:
        lines = [line.split() for line in http.get("/metrics").text.splitlines()]
        names = ("rollouts_stored_total", "rollout_rewards_total", "rollout_write_seconds_count")
        return [float(line[1]) for name in names for line in lines if line[0] == f"qsharp_{name}"]

    before = values()
    choices = complete(http, n=3)["choices"]
    for _ in range(2):
        http.post(f"/v1/rollouts/{choices[0]['rollout_id']}/reward", json={"reward": 1})
    assert [now - then for now, then in zip(values(), before, strict=True)] == [3, 1, 1]


# -- failures


def test_a_failing_store_is_503_and_an_error_in_a_stream(http: httpx.Client, stored: Stored) -> None:
    def rename(old: str, new: str) -> None:
        outside = sqlite3.connect(stored.database, timeout=30)
        outside.execute(f"ALTER TABLE {old} RENAME TO {new}")
        outside.close()

    body = {"model": "tiny", "prompt": "Hello", "messages": MESSAGES, "max_tokens": 5, "store": True}
    rename("rollouts", "gone")
    try:
        for route in ("/v1/completions", "/v1/chat/completions"):
            error = error_of(http.post(route, json=body), 503)
            assert "rollout store failed" in error["message"]
            last = events(http, route, body)[-1]
            assert last["error"]["code"] == 503
            assert "rollout store failed" in last["error"]["message"]
        assert http.post("/v1/completions", json={**body, "store": False}).status_code == 200
    finally:
        rename("gone", "rollouts")
    assert complete(http)


@pytest.mark.v2  # the V1 server has one
def test_a_server_without_a_store_says_how_to_have_one(server_v2: Server) -> None:
    with httpx.Client(base_url=server_v2.url, timeout=60, headers={"Authorization": f"Bearer {ADMIN_KEY}"}) as http:
        for method, path in [
            ("GET", "/v1/rollouts"), ("GET", "/v1/rollouts/rol_0"), ("GET", "/v1/rollouts/export"),
            ("POST", "/v1/rollouts/import"), ("POST", "/v1/rollouts/rewards"), ("POST", "/v1/rollouts/rol_0/reward"),
            ("GET", "/v1/chat/completions"), ("GET", "/v1/chat/completions/chatcmpl-0"),
            ("DELETE", "/v1/chat/completions/chatcmpl-0"), ("GET", "/v1/chat/completions/chatcmpl-0/messages"),
        ]:  # fmt: skip
            assert "--rollouts" in error_of(http.request(method, path), 409)["message"]
        for route, asked in [("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": MESSAGES})]:
            error = error_of(http.post(route, json={"model": "tiny", "store": True, **asked}), 400)
            assert error["param"] == "store"
            assert "--rollouts" in error["message"]


# -- kills


async def load(url: str, seen: dict[str, list[int]], rewarded: set[str]) -> None:
    """Clients that store until the server is gone; `seen` are the rollouts that they were told of, with tokens."""

    async def client(i: int) -> None:
        body = {
            "model": "tiny", "prompt": PROMPT, "max_tokens": 12, "store": True, "return_token_ids": True,
            "eta": 0.1 if i % 3 == 0 else None, "n": 1 + i % 2,
        }  # fmt: skip
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            while True:
                if i % 4 < 2:
                    await stream(http, body)
                    continue
                answer = await http.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                choices = answer.json()["choices"]
                seen.update({choice["rollout_id"]: choice["token_ids"] for choice in choices})
                items = [{"id": choice["rollout_id"], "reward": 1.0} for choice in choices]
                if (await http.post("/v1/rollouts/rewards", json={"items": items})).status_code == 200:
                    rewarded.update(item["id"] for item in items)

    async def stream(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        tokens: dict[int, list[int]] = {}
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    tokens.setdefault(choice["index"], []).extend(choice["token_ids"])
                    if choice["finish_reason"]:
                        seen[choice["rollout_id"]] = tokens[choice["index"]]

    results = await asyncio.gather(*(client(i) for i in range(8)), return_exceptions=True)
    assert all(isinstance(result, httpx.TransportError) for result in results), results


def test_nothing_that_a_client_saw_is_lost_by_a_kill(tmp_path: Path) -> None:
    given = arguments(tmp_path)
    seen: dict[str, list[int]] = {}
    rewarded: set[str] = set()
    moments = random.Random(3)

    async def killed(url: str) -> None:
        process = process_of(url)
        running = asyncio.create_task(load(url, seen, rewarded))
        before = len(seen)
        deadline = time.monotonic() + 60
        while len(seen) < before + 10 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await asyncio.sleep(moments.uniform(0, 1))
        os.killpg(process, signal.SIGKILL)
        await running

    for _ in range(3):
        with serve(given, tmp_path / "log") as url:
            asyncio.run(killed(url))
    store = RolloutStore(str(tmp_path / "rollouts.db"))
    found = {r.id: r for batch in store.batches(Filters(), 1000, owner=None) for r in batch}
    count = sum(len(batch) for batch in store.batches(Filters(), 1000, owner=None))
    store.close()
    assert count == len(found)
    assert len(seen) >= 30
    assert rewarded
    for name, tokens in seen.items():
        assert found[name].completion_token_ids == tokens
    assert all(found[name].reward == 1.0 and len(found[name].rewards) == 1 for name in rewarded)
