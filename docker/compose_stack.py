"""The compose project that `compose_check.py` starts, under a name, secrets and ports of its own."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import http_check
import make_secrets
from http_check import fail

HERE = Path(__file__).parent
PROJECT = "qsharp-check"


def require_docker() -> None:
    """Ends the check where it cannot run, and says what is missing."""
    if shutil.which("docker") is None:
        fail("there is no `docker` in PATH: install Docker Engine with Compose 2 (docs.docker.com/engine/install)")
    if not succeeds("compose", "--progress", "quiet", "version"):  # early versions of Compose 2 do not know the flag
        fail("`docker` has no recent Compose 2: install docker-compose-plugin (docs.docker.com/compose/install/linux)")
    if not succeeds("version", timeout=60):
        fail("the Docker engine does not answer: start it, and see that you may use it (`docker version` says more)")


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
        self.secrets = folder / "secrets"
        make_secrets.make(self.secrets)
        ports = {name: free_port() for name in ("SERVER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")}
        self.url, self.prometheus = (f"http://127.0.0.1:{ports[name]}" for name in ("SERVER_PORT", "PROMETHEUS_PORT"))
        settings = {"SECRETS": self.secrets, **ports, **http_check.SETTINGS}
        for name in settings:
            os.environ.pop(name, None)  # the shell's would win over the file's
        env = folder / "env"
        env.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        self._changes = folder / "changes.yaml"
        self._options = ["compose", "--progress", "quiet", "-p", PROJECT, "--env-file", str(env)]
        self._files = [HERE / "compose.yaml"]
        self._changed: dict[str, Any] = {}
        self.services = self._services()

    def _services(self) -> dict[str, Any]:
        services: dict[str, Any] = json.loads(self("config", "--format", "json", quiet=True))["services"]
        return services

    def change(self, services: dict[str, Any]) -> None:
        """Has these services differ from the files in what is given."""
        self._changed |= services
        self._changes.write_text(json.dumps({"services": self._changed}))
        self.services = self._services()

    def add(self, file: Path) -> None:
        """Reads this file, too."""
        self._files.append(file)
        self.services = self._services()

    def secret(self, name: str) -> str:
        """One of the secrets."""
        return (self.secrets / name).read_text()

    def _command(self, *arguments: str) -> list[str]:
        files = [*self._files, self._changes] if self._changed else self._files
        return [*self._options, *(part for file in files for part in ("-f", str(file))), *arguments]

    def __call__(self, *arguments: str, quiet: bool = False) -> str:
        return docker(*self._command(*arguments), quiet=quiet)

    def up(self, *services: str) -> None:
        """Starts what does not run, and waits until it is healthy."""
        self("up", "-d", "--no-build", "--wait", "--wait-timeout", "900", *services, quiet=True)

    def inside(self, service: str, *command: str, number: int = 1) -> str:
        """Output of a command in a service's container, or in the one of that number where there are several."""
        return self("exec", "-T", "--index", str(number), service, *command, quiet=True)

    def works_inside(self, service: str, *command: str) -> bool:
        """Whether a command in a service's container succeeds."""
        return succeeds(*self._command("exec", "-T", service, *command))

    def sql(self, query: str) -> str:
        """Asks the store's database itself."""
        return self.inside("postgres", "psql", "-U", "qsharp", "-d", "qsharp", "-tAc", query)

    def stored(self, ids: list[str], also: str = "true") -> int:
        """How many of these rollouts are in the database, of those that an SQL condition holds for."""
        listed = ", ".join(f"'{one}'" for one in ids)
        return int(self.sql(f"select count(*) from rollouts where {also} and id in ({listed})"))

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


def at_hand(image: str) -> bool:
    """Whether an image is there or can be had."""
    return succeeds("image", "inspect", image) or succeeds("pull", "-q", image)


def from_nowhere(image: str) -> bool:
    """Whether an image was never in a registry."""
    return docker("image", "inspect", "-f", "{{len .RepoDigests}}", image) == "0"
