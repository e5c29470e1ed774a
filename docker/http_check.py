"""What a deployment does for those who reach it over HTTP; needs nothing but Python.

`compose_check.py` asks this of containers, `tests/docker/test_http_check.py` of a server and a trainer that `make test`
starts. Nothing here names what may change: which model is served, which critic is shipped and which version was
learned, the server is asked.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.request import Request, urlopen

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
LEARNED = "animals"  # name of the critic that the trainer learns
NEW = 64  # rollouts that the trainer waits for
# What compose.yaml is to be filled in with. Small and quick: tried is the way of a version, not how good it is.
SETTINGS: dict[str, Any] = {
    "CRITIC_NAME": LEARNED,
    "MIN_NEW_ROLLOUTS": NEW,
    "LOOK_SECONDS": 5,
    "TRAIN_ARGS": "--layers 2 --mlp 64 --borrow-embeddings --lr 1e-3 --epochs 12 --batch-tokens 512 --held-out 0.25",
}
STARTED = time.monotonic()
SELECTOR = re.compile(r"((?:qsharp_|vllm:|http_)\w+)(?:\{([^}]*)\})?")
SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')

Samples = Callable[[str], list[float]]
"""The values of the series that a selector of one metric, such as `up{job="qsharp"}`, has now."""


def say(text: str) -> None:
    """One line of progress, with the seconds since the start."""
    print(f"[+{time.monotonic() - STARTED:4.0f}s] {text}", flush=True)


def fail(text: str) -> NoReturn:
    """Ends the check."""
    raise SystemExit(f"FAILED: {text}")


def check(good: bool, text: str) -> None:
    """A claim of the check: said if it holds, the end if not."""
    if not good:
        fail(text)
    say(f"ok: {text}")


def wait_for(what: str, seconds: float, probe: Callable[[], Any], pause: float = 2.0) -> Any:
    """Polls until `probe` returns something that is true."""
    deadline = time.monotonic() + seconds
    while not (found := probe()):
        if time.monotonic() > deadline:
            fail(f"{what}: not within {seconds:.0f} s")
        time.sleep(pause)
    return found


class Api:
    """A service at a base URL."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url = url
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def send(self, path: str, body: Any = None, timeout: float = 300) -> tuple[int, Any]:
        """Status and answer of a POST of `body`, or of a GET without one."""
        request = Request(self._url + path, None if body is None else json.dumps(body).encode(), self._headers)
        try:
            with urlopen(request, timeout=timeout) as answer:
                return answer.status, json.load(answer)
        except HTTPError as error:
            return error.code, json.load(error)

    def __call__(self, path: str, body: Any = None) -> Any:
        status, answer = self.send(path, body)
        if status != 200:
            fail(f"{path} answered {status}: {answer}")
        return answer

    @cached_property
    def model(self) -> str:
        """Of the server: what it serves."""
        name: str = self("/v1/models")["data"][0]["id"]
        return name

    def completion(self, **fields: Any) -> dict[str, Any]:
        """Of the server: body of a short completion."""
        return {"model": self.model, "max_tokens": 8, "ignore_eos": True, **fields}

    def samples(self, selector: str) -> list[float]:
        """Of the server: what `/metrics` shows, as `Samples`."""
        with urlopen(Request(self._url + "/metrics", headers=self._headers), timeout=60) as answer:
            return shown(answer.read().decode(), selector)


# -- metrics


def shown(text: str, selector: str) -> list[float]:
    """As `Samples`, from the text of `/metrics`."""
    (wanted, matchers), *_ = SELECTOR.findall(selector)
    if LABEL.sub("", matchers).strip(", "):
        fail(f"{selector}: labels are compared by = alone here")
    labels = set(LABEL.findall(matchers))
    return [
        float(value)
        for name, having, value in SAMPLE.findall(text)
        if name == wanted and labels <= set(LABEL.findall(having))
    ]


def queries() -> Iterator[str]:
    """What the dashboards ask, with Grafana's variables filled in."""
    for path in sorted((HERE / "grafana" / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
        for target in [*targets, *dashboard["annotations"]["list"]]:
            if "expr" in target:
                yield target["expr"].replace("$__rate_interval", "10m").replace("$__range", "1h")


def selectors() -> list[str]:
    """What dashboards and alerts select."""
    text = "\n".join([*queries(), (HERE / "prometheus" / "rules.yml").read_text()])
    return sorted({match[0] for match in SELECTOR.finditer(text)})


def metrics(samples: Samples) -> None:
    """What was done before shows, and dashboards and alerts find all that they ask for."""
    for what, selector in {
        "KL of guided completions, nats": "qsharp_completion_kl_nats_sum",
        "seconds that critics took": "qsharp_critic_step_seconds_sum",
        "seconds that requests took": "vllm:e2e_request_latency_seconds_sum",
        "rollouts stored": "qsharp_rollouts_stored_total",
        "rewards given": "qsharp_rollout_rewards_total",
        f"time at which {LEARNED} was activated": f'qsharp_critic_activated_timestamp_seconds{{name="{LEARNED}"}}',
    }.items():
        found = sum(samples(selector))
        check(found > 0, f"{what}: {found:.3f}")
    wanted = selectors()
    missing = [selector for selector in wanted if not samples(selector)]
    if missing:
        fail(f"dashboards and alerts select what is not there: {missing}")
    say(f"ok: all {len(wanted)} series that dashboards and alerts select are there")


# -- what is checked, in order


def keys(url: str, user: str) -> None:
    """Who may do what; `user` is a key that is not the admin's."""
    for name, key, path, body, wanted in [
        ("no key", None, "/v1/models", None, 401),
        ("a wrong key", "wrong", "/v1/models", None, 401),
        ("a user's key", user, "/v1/models", None, 200),
        ("a user's key, loading a critic", user, "/v1/critics", {"path": "/nowhere"}, 403),
    ]:
        status, _ = Api(url, key).send(path, body)
        check(status == wanted, f"{name}: {status}")


def guided(api: Api) -> list[str]:
    """README's two examples: plain completions, and guided ones, which are stored and rewarded; ids of the latter."""
    shipped = next((critic["id"] for critic in api("/v1/critics")["data"] if critic["default"]), None)
    plain, body = (json.loads((EXAMPLES / name).read_text()) for name in ("sums.json", "sums-guided.json"))
    for choice in api("/v1/completions", plain)["choices"]:
        if choice["guidance"]["tokens_guided"] != 0:
            fail(f"guided without being asked to: {choice}")
    right = sum(int(number) for number in re.findall(r"\d+", body["prompt"].splitlines()[-2]))
    rewards, kls = {}, []
    for choice in api("/v1/completions", {**body, "store": True})["choices"]:
        said, one = choice["guidance"], choice["rollout_id"]
        if not (said["critic"] == shipped and said["tokens_guided"] > 0 and said["kl"] > 0):
            fail(f"not guided by {shipped}: {choice}")
        rewards[one] = float(choice["text"].rstrip().endswith(f"answer is {right}."))
        api(f"/v1/rollouts/{one}/reward", {"reward": rewards[one], "source": "check"})
        kls.append(said["kl"])
    number = len(rewards)
    check(number == body["n"], f"{number} completions guided by {shipped}, {sum(kls) / number:.2f} nats of KL each")
    kept = {one: api(f"/v1/rollouts/{one}")["reward"] for one in rewards}
    check(kept == rewards, f"all are stored, with their rewards: {sum(rewards.values()):.0f} answered {right}")
    return list(rewards)


def learning(api: Api) -> None:
    """The trainer makes a version from rewarded rollouts and has the server guide with it."""

    def told(about: tuple[int, str]) -> str:
        prompt = "Here is story number {}, which is about a {}:".format(*about)
        one: str = api("/v1/completions", api.completion(prompt=prompt, store=True))["choices"][0]["rollout_id"]
        return one

    # Prompts of two kinds, of which one pays: easily learned from few.
    stories = [(number, animal) for number in range(NEW // 2) for animal in ("cat", "dog")]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(told, stories))
    items = [{"id": one, "reward": float(animal == "cat")} for one, (_, animal) in zip(ids, stories, strict=True)]
    api("/v1/rollouts/rewards", {"items": items})
    say(f"{len(items)} unguided rollouts have rewards; the trainer waits for as many")
    learned = wait_for("a version that the trainer publishes and activates", 480, lambda: active(api))
    body = api.completion(prompt="A story:", eta=0.1, guidance={"critic": LEARNED}, store=True)
    (choice,) = api("/v1/completions", body)["choices"]
    said = choice["guidance"]
    check(said["critic"] == learned and said["tokens_guided"] > 0, f"the trainer's {learned} is active and guides")
    api(f"/v1/rollouts/{choice['rollout_id']}/reward", {"reward": 1.0})


def active(api: Api) -> str | None:
    """The trainer's version that is active."""
    versions = api("/v1/critics")["data"]
    return next((one["id"] for one in versions if one["name"] == LEARNED and one["active"]), None)


@dataclass
class Traffic:
    """What clients have got: the ids of stored rollouts that they were told, and how many requests were lost."""

    stored: list[str] = field(default_factory=list)
    lost: int = 0


@contextmanager
def traffic(api: Api, clients: int) -> Iterator[Traffic]:
    """So many clients ask for completions that are stored, one after another, until this ends."""
    seen, stop = Traffic(), threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                body = api.completion(prompt="Once", store=True, n=2)
                _, answer = api.send("/v1/completions", body, timeout=60)
                seen.stored.extend(choice["rollout_id"] for choice in answer["choices"])
            except (OSError, HTTPException, KeyError, ValueError):  # URLError is an OSError
                seen.lost += 1
                stop.wait(0.5)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def drained(api: Api, stop: Callable[[], object]) -> float:
    """A request on its way when the server is told to stop gets its answer; seconds that `stop` took.

    Args:
        api: the server.
        stop: tells it to stop and waits until it has ended.
    """
    body = api.completion(prompt="A long story:", max_tokens=128, store=True)
    with ThreadPoolExecutor(1) as client:
        request = client.submit(api, "/v1/completions", body)
        wait_for("a request that runs", 60, lambda: any(api.samples("vllm:num_requests_running")), pause=0.1)
        if request.done():
            fail("the request ended before the server was told to stop")
        begun = time.monotonic()
        stop()
        took = time.monotonic() - begun
        try:
            tokens = request.result()["usage"]["completion_tokens"]
        except (OSError, HTTPException) as error:
            fail(f"told to stop, the server leaves a request without its answer: {error}")
    check(tokens == body["max_tokens"], f"told to stop, the server ends a request of {tokens} tokens first")
    return took
