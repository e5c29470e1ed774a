"""A server without a model: the real store and its real routes, answers that follow from the seed, faults on order.

A token is a character. To a sum's prompt it answers with a worked sum that is right with a known probability; to any
other with random letters.
"""

import asyncio
import json
import math
import random
import re
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from qsharp_core.errors import QSharpError
from qsharp_core.rollouts.records import Rollout, Sampling, first_valid_position, new_id
from server import errors
from server.access.principal import SCOPE_KEY, UNNAMED, Principal, principal_of
from server.api import rewards, rollouts
from server.store.filters import Filters
from server.store.rollouts import RolloutStore

QUESTION = re.compile(r".*What is (\d) \+ (\d) \+ (\d)\?\nAnswer:(.*)\Z", re.DOTALL)
CRITIC = "fake@1"


def chance(eta: float | None, method: str) -> float:
    """Of a right answer: the stronger the guidance the better, and CD is worse than Q-sharp."""
    gain = 0.0 if eta is None else 1 / (1 + eta / 0.1)
    return 0.5 + 0.45 * gain * (0.5 if method == "cd" else 1.0)


@dataclass
class Loaded:
    """A critic's version."""

    name: str
    version: str
    path: str = ""
    active: bool = False

    def shown(self, default: bool) -> dict[str, Any]:
        card = {"reward_range": [0.0, 1.0], "recommended_eta": 0.1}
        about = {
            "active": self.active, "default": default, "max_length": 4096, "path": self.path, "leaving": False,
            "loaded": True, "share": float(self.active), "users": 0, "in_flight": 0, "kv_blocks": None,
            "kv_blocks_used": None, "metrics": None,
        }  # fmt: skip
        return {"id": f"{self.name}@{self.version}", "name": self.name, "version": self.version, **about, "card": card}


@dataclass
class FakeServer:
    """Its state, shared with the test.

    Attributes:
        faults: what happens to the next samples: a status, "lost" (stored, but the answer does not arrive), "dropped".
        posts: how often each path was posted to.
        critics: those that are loaded, by key; `root` is the model's folder.
        ids: of rollouts, from their metadata.
        seen: bodies of the sampling requests that were served.
        decisions: what was decided about critics, as `GET /v1/critics/{name}` tells.
        wanted: what the store says that its servers are to have; None where a server decides alone.
        keys: their holders; whoever sends another one, or none, is an admin without a name.
    """

    store: RolloutStore
    url: str = ""
    faults: deque[int | str | None] = field(default_factory=deque)
    posts: Counter[str] = field(default_factory=Counter)
    seen: list[dict[str, Any]] = field(default_factory=list)
    critics: dict[str, Loaded] = field(default_factory=lambda: {CRITIC: Loaded("fake", "1", active=True)})
    root: str | None = None
    ids: Callable[[dict[str, str]], str] = lambda metadata: new_id()
    delay: float = 0.0
    refuse: Callable[[dict[str, Any]], bool] = lambda body: False
    keys: dict[str, Principal] = field(default_factory=dict)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    wanted: dict[str, Any] | None = None

    def stored(self) -> list[Rollout]:
        return [one for batch in self.store.batches(Filters(), 1000, owner=None) for one in batch]


def right(a: int, b: int, c: int) -> str:
    return f" {a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}. The answer is {a + b + c}."


def continued(prompt: str, rng: random.Random, probability: float) -> str:
    """What the model goes on with."""
    match = QUESTION.match(prompt)
    if match is None:
        return "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 12)))
    a, b, c = map(int, match.groups()[:3])
    if rng.random() >= probability:
        c += rng.choice([-1, 1])
    return right(a, b, c)[len(match[4]) :]


def respond(fake: FakeServer, body: dict[str, Any], chat: bool, owner: str) -> tuple[list[Rollout], dict[str, Any]]:
    """Rollouts of a request, and what its client gets."""
    given = "".join(m["content"] for m in body["messages"]) if chat else body["prompt"]
    prompt = given if isinstance(given, str) else "".join(map(chr, given))
    guidance, metadata = body.get("guidance") or {}, body.get("metadata") or {}
    eta, method = body["eta"] if "kl_total" not in guidance else body.get("eta", 0.1), guidance.get("method", "qsharp")
    parent = fake.store.get(metadata["qsharp_parent"], owner=None) if "qsharp_parent" in metadata else None
    cut = int(metadata["qsharp_cut"]) if parent else None
    beginning = list(parent.completion_token_ids[:cut]) if parent else []
    if parent:
        if "qsharp_forced" in metadata:
            beginning[-1] = int(metadata["qsharp_forced"])
        assert given == [*parent.prompt_token_ids, *beginning]
        assert eta is None
    made, choices = [], []
    sampling = Sampling(
        temperature=body["temperature"], top_p=body.get("top_p", 1.0), top_k=body.get("top_k", 0)
    )  # fmt: skip
    seed = body.get("seed", random.getrandbits(40))  # as an engine draws that is not told
    for index in range(body.get("n") or 1):
        rng = random.Random(seed + index)
        text = continued(prompt, rng, chance(eta, method))
        if parent and not text:
            text = "."
        tokens, finish = [ord(c) for c in text][: body["max_tokens"]], "stop"
        if len(tokens) < len(text):
            finish, text = "length", text[: body["max_tokens"]]
        kl = 0.0 if eta is None else (0.02 + 0.01 * rng.random()) * len(tokens) / (eta + 0.1)
        whole = [*beginning, *tokens]
        first = first_valid_position(guided=eta is not None, length=len(whole), cut=cut, finish_reason=finish)
        rollout = Rollout(
            id=fake.ids(metadata), owner=owner, request_id=f"cmpl-{seed}", choice=index,
            route="chat" if chat else "completion", created=time.time(), model=body["model"],
            prompt_token_ids=parent.prompt_token_ids if parent else [ord(c) for c in prompt],
            completion_token_ids=whole, prompt_text=parent.prompt_text if parent else prompt,
            completion_text="".join(map(chr, whole)), messages=body.get("messages"),
            sampling=sampling,
            eta=eta, method=method if eta is not None else None,
            critic=guidance.get("critic", CRITIC) if eta is not None else None,
            first_valid_position=first, parent_id=parent.id if parent else None, cut=cut, kl=kl, finish_reason=finish,
            metadata=metadata,
        )  # fmt: skip
        made.append(rollout)
        choices.append(
            {"index": index, "finish_reason": finish, "token_ids": tokens, "prompt_token_ids": [ord(c) for c in prompt]}
            | ({"message": {"role": "assistant", "content": text}} if chat else {"text": text})
            | ({"rollout_id": rollout.id} if body.get("store") else {})
            | ({"prompt_logprobs": alternatives(prompt)} if body.get("prompt_logprobs") else {})
            | ({"logprobs": as_drawn(text, chat)} if body.get("logprobs") else {})
            | ({"guidance": {"kl": kl, "tokens_total": len(tokens)}} if eta is not None else {})
        )
    tokens_made = sum(len(rollout.completion_token_ids) for rollout in made)
    about = {"id": made[0].request_id, "model": body["model"], "usage": {"completion_tokens": tokens_made}}
    return made, about | {"choices": choices}


def alternatives(prompt: str) -> list[dict[str, Any] | None]:
    """Log-probabilities of a prompt's tokens, as vLLM lists them: it is unsure of digits alone."""

    def listed(character: str) -> dict[str, Any]:
        able = "0123456789" if character.isdigit() else character
        return {
            str(ord(c)): {"logprob": -math.log(len(able)), "rank": rank, "decoded_token": c}
            for rank, c in enumerate(able, start=1)
        }

    return [None, *map(listed, prompt[1:])]


def as_drawn(text: str, chat: bool) -> dict[str, Any]:
    """The same of a completion's tokens, in the form that its route has."""
    places = [
        {f"token_id:{token}": entry["logprob"] for token, entry in (place or {}).items()}
        for place in alternatives("?" + text)[1:]
    ]
    if not chat:
        return {"top_logprobs": places}
    listed = [[{"token": token, "logprob": value} for token, value in place.items()] for place in places]
    return {"content": [{"top_logprobs": one} for one in listed]}


def as_token(character: str | int) -> int:
    return ord(character) if isinstance(character, str) else character


def scored(prompt: list[int] | str, completion: list[int] | str) -> list[float]:
    """A critic that sees at the end whether a sum is right, most of the time."""
    question, text = (one if isinstance(one, str) else "".join(map(chr, one)) for one in (prompt, completion))
    match = QUESTION.match(question)
    good = match is not None and text == right(*map(int, match.groups()[:3]))
    noise = random.Random(text).random() * 0.3
    return [0.5] * (len(completion) - 1) + [0.6 + noise if good else 0.4 - noise]


class Named:
    """Says whose key a request has, as the gate does."""

    def __init__(self, app: Any, keys: dict[str, Principal]) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            key = dict(scope["headers"]).get(b"authorization", b"").decode().removeprefix("Bearer ")
            scope[SCOPE_KEY] = self.keys.get(key, Principal(UNNAMED, admin=True))
        await self.app(scope, receive, send)


def application(fake: FakeServer) -> FastAPI:
    app = FastAPI()
    app.state.qsharp = SimpleNamespace(store=fake.store, critics=SimpleNamespace(catalog=SimpleNamespace(critics={})))
    app.add_exception_handler(QSharpError, errors.handle)
    app.add_middleware(Named, keys=fake.keys)
    rewards.attach(app)
    rollouts.attach(app)

    async def sample(request: Request) -> Response:
        body = await request.json()
        fake.posts["sample"] += 1
        fault = fake.faults.popleft() if fake.faults else None
        if isinstance(fault, int):
            error = {"message": f"fault {fault}", "type": "x", "param": None, "code": fault}
            return JSONResponse({"error": error}, status_code=fault, headers={"Retry-After": "0"})
        if fault == "dropped":
            return Broken()
        if fake.refuse(body):
            return JSONResponse({"error": {"message": "too long", "param": "prompt", "code": 400}}, status_code=400)
        await asyncio.sleep(fake.delay)
        made, answer = respond(fake, body, chat="messages" in body, owner=principal_of(request).name)
        fake.seen.append(body)
        if body.get("store"):
            await fake.store.add(made)
        await asyncio.sleep(fake.delay / 4)
        return Broken() if fault == "lost" else JSONResponse(answer)

    async def detokenize(request: Request) -> Any:
        return {"prompt": "".join(map(chr, (await request.json())["tokens"]))}

    async def score(request: Request) -> Any:
        body = await request.json()
        fake.posts["score"] += 1
        given = [body["completion"]] if isinstance(body["completion"], str) else body["completion"]
        data = [
            {"index": i, "token_ids": [*map(as_token, one)], "values": scored(body["prompt"], one)}
            for i, one in enumerate(given)
        ]
        return {"critic": CRITIC, "data": data}

    def models() -> Any:
        return {"data": [{"id": "fake", "root": fake.root}]}

    def critics() -> Any:
        first = next((one.name for one in fake.critics.values()), None)
        shown = [one.shown(one.active and one.name == first) for one in fake.critics.values()]
        return {"data": shown, "wanted": fake.wanted}

    async def load(request: Request) -> Any:
        path = Path((await request.json())["path"])
        card = json.loads((path / "critic.json").read_text())
        key = f"{card['name']}@{card['version']}"
        fake.posts["load"] += 1
        first = all(one.name != card["name"] for one in fake.critics.values())
        fake.critics[key] = Loaded(card["name"], card["version"], str(path), active=first)
        return fake.critics[key].shown(default=False)

    async def activate(name: str, request: Request) -> Any:
        body = await request.json()
        version, share = body["version"], body.get("share", 1)
        fake.posts["activate"] += 1
        fake.decisions.append({"name": name, "version": version, "share": share, "created": time.time()})
        for one in fake.critics.values():
            if one.name == name and share == 1:
                one.active = one.version == version
        return {"id": f"{name}@{version}"}

    def decisions(name: str) -> Any:
        return {"decisions": [one for one in fake.decisions if one["name"] == name]}

    def unload(name: str, version: str) -> Any:
        return {"id": fake.critics.pop(f"{name}@{version}").version}

    app.add_api_route("/v1/completions", sample, methods=["POST"])
    app.add_api_route("/v1/chat/completions", sample, methods=["POST"])
    app.add_api_route("/detokenize", detokenize, methods=["POST"])
    app.add_api_route("/v1/critics/{key}/score", score, methods=["POST"])
    app.add_api_route("/v1/models", models)
    app.add_api_route("/v1/critics", critics)
    app.add_api_route("/v1/critics", load, methods=["POST"])
    app.add_api_route("/v1/critics/{name}", decisions)
    app.add_api_route("/v1/critics/{name}/activate", activate, methods=["POST"])
    app.add_api_route("/v1/critics/{name}/{version}", unload, methods=["DELETE"])
    return app


class Broken(Response):
    """An answer whose connection breaks."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})


@contextmanager
def running(database: str) -> Iterator[FakeServer]:
    """It, in a thread."""
    fake = FakeServer(RolloutStore(database))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(application(fake), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield fake
        finally:
            server.should_exit = True
            thread.join()
            fake.store.close()
