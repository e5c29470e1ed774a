"""Brings the whole deployment up and uses it as its users would: `make compose-check`, some fifteen minutes.

    python3 docker/compose_check.py [--keep]        needs a Docker engine with Compose 2, and nothing but Python

It builds the images, starts everything under a project name, keys and ports of its own, and removes all of it at the
end (`--keep` leaves it running). Where no registry can be reached, PostgreSQL and Prometheus are built from Debian's
packages (`stand_ins/`) and Grafana is left out: its dashboards are then validated against Prometheus itself. The last
lines say what was a stand-in, and so what the run does not prove.
"""

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

HERE = Path(__file__).parent
PROJECT = "qsharp-check"
BASE = "python:3.11-slim-bookworm"
OURS = ("server", "trainer")
MODEL = "SmolLM2-135M-Instruct"
LEARNED = "learned@1"
NEW = 64  # rollouts that the trainer waits for
# Small and quick: what is tried here is the way of a version, not how good it is.
TRAIN = "--layers 2 --mlp 64 --borrow-embeddings --lr 1e-3 --epochs 12 --batch-tokens 512 --held-out 0.25"
STARTED = time.monotonic()


def say(text: str) -> None:
    """One line of progress, with the seconds since the start."""
    print(f"[+{time.monotonic() - STARTED:4.0f}s] {text}", flush=True)


def fail(text: str) -> NoReturn:
    """Ends the check."""
    raise SystemExit(f"compose-check FAILED: {text}")


def check(good: bool, text: str) -> None:
    """A claim of the check: said if it holds, the end if not."""
    if not good:
        fail(text)
    say(f"ok: {text}")


def wait_for(what: str, seconds: float, probe: Callable[[], Any]) -> Any:
    """Polls until `probe` returns something that is true."""
    deadline = time.monotonic() + seconds
    while not (found := probe()):
        if time.monotonic() > deadline:
            fail(f"{what}: not within {seconds:.0f} s")
        time.sleep(2)
    return found


# -- the engine


def docker(*arguments: str, quiet: bool = False) -> str:
    """Output of a docker command that must succeed; what it says of its progress is shown unless it is to be quiet."""
    done = subprocess.run(["docker", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None)
    if done.returncode:
        said = (done.stdout + (done.stderr or b"")).decode(errors="replace")
        fail(f"docker {' '.join(arguments)} ended with {done.returncode}\n{said[-2000:]}")
    return done.stdout.decode(errors="replace").strip()


def succeeds(*arguments: str, timeout: float = 300) -> bool:
    """Whether a docker command does; it says nothing."""
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


class Stack:
    """The compose project, with settings of its own."""

    def __init__(self, folder: Path) -> None:
        self.keys = {name: secrets.token_hex(16) for name in ("API_KEY", "ADMIN_KEY", "POSTGRES_PASSWORD")}
        self.ports = {name: free_port() for name in ("SERVER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")}
        settings = {
            **self.keys, **self.ports, "GRAFANA_PASSWORD": secrets.token_hex(16), "MIN_NEW_ROLLOUTS": NEW,
            "LOOK_SECONDS": 5, "TRAIN_ARGS": TRAIN,
        }  # fmt: skip
        for name in settings:
            os.environ.pop(name, None)  # the shell's would win over the file's
        env = folder / "env"
        env.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        file = str(HERE / "compose.yaml")
        self._options = ("compose", "--progress", "quiet", "-p", PROJECT, "--env-file", str(env), "-f", file)
        self.services: dict[str, Any] = json.loads(self("config", "--format", "json", quiet=True))["services"]

    def __call__(self, *arguments: str, quiet: bool = False) -> str:
        return docker(*self._options, *arguments, quiet=quiet)

    def inside(self, service: str, *command: str) -> str:
        """Output of a command in a service's container."""
        return self("exec", "-T", service, *command, quiet=True)

    def sql(self, query: str) -> str:
        """Asks the store's database itself."""
        return self.inside("postgres", "psql", "-U", "qsharp", "-d", "qsharp", "-tAc", query)

    def container(self, service: str) -> dict[str, Any]:
        """What the engine says of a service's container."""
        found: list[dict[str, Any]] = json.loads(docker("inspect", self("ps", "-aq", service, quiet=True)))
        return found[0]


def free_port() -> int:
    """A loopback port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def images(stack: Stack) -> tuple[list[str], list[str]]:
    """Has the services' images at hand; which services there are then, and what is a stand-in."""
    services, notes = list(OURS), []
    for service in ("postgres", "prometheus", "grafana"):
        image, stand_in = stack.services[service]["image"], HERE / "stand_ins" / service
        if not succeeds("image", "inspect", image) and not succeeds("pull", "-q", image):
            if not stand_in.is_dir():
                notes.append(f"{image}: cannot be had; {service} was left out")
                continue
            say(f"{image} cannot be had: building a stand-in from Debian's package")
            docker("build", "-q", "-t", image, str(stand_in), quiet=True)
        services.append(service)
        if from_nowhere(image):
            notes.append(f"{image}: a stand-in, made here from Debian's package")
    if succeeds("image", "inspect", BASE) and from_nowhere(BASE):
        notes.append(f"{BASE}: a stand-in, made here from Debian's packages and the host's Python")
    return services, notes


def from_nowhere(image: str) -> bool:
    """Whether an image was never in a registry."""
    return docker("image", "inspect", "-f", "{{len .RepoDigests}}", image) == "0"


# -- HTTP


class Api:
    """A service's published port."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self._url = f"http://127.0.0.1:{port}"
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

    def query(self, expression: str) -> list[Any]:
        """Of Prometheus: the samples of an instant query."""
        result: list[Any] = self(f"/api/v1/query?{urlencode({'query': expression})}")["data"]["result"]
        return result


def completion(**fields: Any) -> dict[str, Any]:
    """Body of a short completion."""
    return {"model": MODEL, "max_tokens": 8, "ignore_eos": True, **fields}


# -- what is checked, in order


def rules_and_files(stack: Stack) -> None:
    """The files that need no running service."""
    prometheus = ("run", "--rm", "--entrypoint", "promtool", "-v", f"{HERE / 'prometheus'}:/etc/prometheus:ro",
                  stack.services["prometheus"]["image"])  # fmt: skip
    docker(*prometheus, "check", "config", "/etc/prometheus/prometheus.yml", quiet=True)
    docker(*prometheus, "test", "rules", "/etc/prometheus/rules.test.yml", quiet=True)
    say("ok: Prometheus's configuration, the alert rules and their tests (promtool)")
    stack("-f", str(HERE / "compose.gpu.yaml"), "config", "-q", quiet=True)
    say("ok: compose.yaml with compose.gpu.yaml (validated, not run)")


def offline(stack: Stack) -> None:
    """The default model is in the image: found with no network, on a read-only root, by another user than root."""
    command = ("-m", "server.presets.smollm2")
    image = stack.services["server"]["image"]
    found = docker("run", "--rm", "--network", "none", "--read-only", "--entrypoint", "python", image, *command)
    check(found.endswith("smollm2-135m-instruct"), f"without a network the default model is there: {found}")


def unprivileged(stack: Stack, services: list[str]) -> None:
    """Nobody is root, and nobody can change his own image."""
    for service in services:
        user = stack.inside(service, "id", "-u")
        host = stack.container(service)["HostConfig"]
        closed = host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["Memory"] > 0
        check(
            user != "0" and closed,
            f"{service}: uid {user}, read-only root, no capabilities, {host['Memory'] >> 30} GiB",
        )


def keys(stack: Stack) -> None:
    """Who may do what."""
    port = stack.ports["SERVER_PORT"]
    for name, key, path, body, wanted in [
        ("no key", None, "/v1/models", None, 401),
        ("a wrong key", "wrong", "/v1/models", None, 401),
        ("a user's key, loading a critic", stack.keys["API_KEY"], "/v1/critics", {"path": "/nowhere"}, 403),
    ]:
        status, _ = Api(port, key).send(path, body)
        check(status == wanted, f"{name}: {status}")


def guided(api: Api, stack: Stack) -> None:
    """A guided completion, stored, rewarded, and found in the database."""
    body = json.loads((HERE.parent / "examples" / "sums-guided.json").read_text())
    answer = api("/v1/completions", {**body, "store": True})
    for choice in answer["choices"]:
        said = choice["guidance"]
        if not (said["critic"] == "sums@1" and said["tokens_guided"] > 0 and said["kl"] > 0):
            fail(f"not guided: {choice}")
        reward = float(" 17" in choice["text"])  # 7 + 2 + 8
        api(f"/v1/rollouts/{choice['rollout_id']}/reward", {"reward": reward, "source": "compose-check"})
    number = len(answer["choices"])
    mean = sum(choice["guidance"]["kl"] for choice in answer["choices"]) / number
    check(True, f"{number} guided completions through the published port, {mean:.2f} nats of KL each")
    ids = ", ".join(f"'{choice['rollout_id']}'" for choice in answer["choices"])
    found = stack.sql(f"select count(*) from rollouts where reward is not null and id in ({ids})")
    check(found == str(number), f"PostgreSQL has {found} of them, with their rewards")


def learning(api: Api) -> None:
    """The trainer makes a version from rewarded rollouts and has the server guide with it."""
    rewards = []
    for i in range(NEW // 2):  # prompts of two kinds, of which one pays: easily learned from few
        for animal, reward in (("cat", 1.0), ("dog", 0.0)):
            prompt = f"Here is story number {i}, which is about a {animal}:"
            answer = api("/v1/completions", completion(prompt=prompt, store=True))
            rewards.append({"id": answer["choices"][0]["rollout_id"], "reward": reward})
    api("/v1/rollouts/rewards", {"items": rewards})
    say(f"{len(rewards)} unguided rollouts have rewards; the trainer waits for as many")
    wait_for("a version that the trainer publishes and activates", 480, lambda: active(api))
    answer = api("/v1/completions", completion(prompt="A story:", eta=0.1, guidance={"critic": "learned"}))
    said = answer["choices"][0]["guidance"]
    check(said["critic"] == LEARNED and said["tokens_guided"] > 0, f"the trainer's {LEARNED} is active and guides")


def active(api: Api) -> bool:
    """Whether the trainer's version is."""
    return any(critic["id"] == LEARNED and critic["active"] for critic in api("/v1/critics")["data"])


def monitoring(prometheus: Api, api: Api) -> None:
    """Prometheus has what alerts and dashboards ask for."""
    time.sleep(25)  # two scrapes of what has happened last
    api("/v1/models")
    (up,) = prometheus.query('up{job="qsharp"}')
    check(up["value"][1] == "1", "Prometheus scrapes the server")
    names = prometheus("/api/v1/label/__name__/values")["data"]
    ours = [name for name in names if name.startswith("qsharp_")]
    for name, expression in {
        "KL of a completion, median": "histogram_quantile(0.5, sum by (le) (qsharp_completion_kl_nats_bucket))",
        "latency of a request, p95, seconds":
            "histogram_quantile(0.95, sum by (le) (vllm:e2e_request_latency_seconds_bucket))",
        "active since, seconds": 'time() - qsharp_critic_activated_timestamp_seconds{name="learned"}',
    }.items():  # fmt: skip
        (sample,) = prometheus.query(expression)
        check(float(sample["value"][1]) > 0, f"{name}: {float(sample['value'][1]):.3f}")
    groups = prometheus("/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    check(bool(rules) and all(rule["health"] == "ok" for rule in rules), f"{len(rules)} alert rules are evaluated")
    empty = [expression for expression in queries() if not prometheus.query(expression)]
    check(not empty, f"every query of the dashboards has data, among {len(ours)} qsharp_ metrics {empty or ''}")


def queries() -> Iterator[str]:
    """What the dashboards ask, with Grafana's variables filled in."""
    for path in sorted((HERE / "grafana" / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
        for target in [*targets, *dashboard["annotations"]["list"]]:
            if "expr" in target:
                yield target["expr"].replace("$__rate_interval", "10m").replace("$__range", "1h")


def grafana(stack: Stack) -> None:
    """Its data source and dashboards are provisioned."""
    script = "wget -qO- http://admin:$GF_SECURITY_ADMIN_PASSWORD@127.0.0.1:3000/api/search?type=dash-db"
    found = json.loads(stack.inside("grafana", "sh", "-c", script))
    wanted = len(list((HERE / "grafana" / "dashboards").glob("*.json")))
    check(len(found) == wanted, f"Grafana has its {wanted} dashboards")


def killed(api: Api, stack: Stack, services: list[str]) -> None:
    """SIGKILL while rollouts are stored: what a client has an answer for is there."""
    answered: list[str] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                _, answer = api.send("/v1/completions", completion(prompt="Once", store=True, n=2), timeout=60)
                answered.extend(choice["rollout_id"] for choice in answer["choices"])
            except (URLError, OSError, KeyError, ValueError):
                return

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    wait_for("answers", 120, lambda: len(answered) >= 40)
    before = int(stack.sql("select count(*) from rollouts"))
    stack("kill", "-s", "SIGKILL", "server", quiet=True)
    stop.set()
    for thread in clients:
        thread.join()
    stack("up", "-d", "--no-build", "--wait", "--wait-timeout", "600", *services, quiet=True)
    ids = ", ".join(f"'{one}'" for one in answered)
    found = stack.sql(f"select count(*) from rollouts where id in ({ids})")
    check(found == str(len(answered)), f"after SIGKILL all {found} answered rollouts are in PostgreSQL")
    check(int(stack.sql("select count(*) from rollouts")) >= before, "and all that were there before")
    wait_for("the trainer to load its version again", 180, lambda: active(api))
    say(f"ok: the server is up again, and the trainer has loaded {LEARNED} into it")


def drained(api: Api, stack: Stack) -> None:
    """A request on its way when the server is told to stop gets its answer."""
    answers: list[tuple[int, Any]] = []
    body = completion(prompt="A long story:", max_tokens=64, store=True)
    thread = threading.Thread(target=lambda: answers.append(api.send("/v1/completions", body)))
    thread.start()
    time.sleep(3)
    begun = time.monotonic()
    stack("stop", "server", quiet=True)
    took = time.monotonic() - begun
    thread.join()
    tokens = answers[0][1]["usage"]["completion_tokens"] if answers and answers[0][0] == 200 else 0
    code = stack.container("server")["State"]["ExitCode"]
    check(tokens == 64, f"told to stop, the server ends a request of {tokens} tokens first")
    check(code == 0 and took < 90, f"and then ends by itself, after {took:.0f} s, with status {code}")


def run(stack: Stack, keep: bool) -> None:
    """All of it."""
    services, notes = images(stack)
    rules_and_files(stack)
    say("building the image; the first time that is PyTorch, vLLM and the default model")
    stack("build", "--quiet")
    offline(stack)
    say(f"starting {', '.join(services)}")
    stack("up", "-d", "--no-build", "--wait", "--wait-timeout", "600", *services)
    api = Api(stack.ports["SERVER_PORT"], stack.keys["API_KEY"])
    keys(stack)
    unprivileged(stack, services)
    guided(api, stack)
    learning(api)
    monitoring(Api(stack.ports["PROMETHEUS_PORT"]), api)
    if "grafana" in services:
        grafana(stack)
    killed(api, stack, services)
    if not keep:
        drained(api, stack)
    say("compose-check passed")
    print("\n".join(["stand-ins:", *(f"  {note}" for note in notes)] if notes else ["no stand-ins"]))
    print("not run here: the cuda target and compose.gpu.yaml, which need a GPU")


def main() -> None:
    """Runs the check, and shows the services' last words if it fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave everything running")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory(prefix="compose-check-") as folder:
        stack = Stack(Path(folder))
        try:
            run(stack, keep)
        except BaseException:
            if succeeds("info"):
                print(stack("logs", "--tail", "40", quiet=True), file=sys.stderr)
            raise
        finally:
            if not keep:
                stack("down", "--volumes", "--remove-orphans", quiet=True)


if __name__ == "__main__":
    main()
