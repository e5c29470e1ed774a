"""The part of the deployment's check that needs no Docker engine, against the processes that `compose.yaml` starts."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import http_check
import make_secrets
from server.access import keys
from tests.support.compose import filled_in, load
from trainer.serving import serve

GRACE = 90.0
SETTINGS = {**http_check.SETTINGS, "LOOK_SECONDS": 1}


def started_with(service: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a service of `compose.yaml`, its secrets among these as files."""
    described = load("compose.yaml")["services"][service]
    environment = {name: filled_in(value, SETTINGS) for name, value in described["environment"].items()}
    mounted = folder / f"secrets-of-{service}"
    mounted.mkdir()
    for name in described["secrets"]:
        shutil.copy(folder / "secrets" / name, mounted)
    environment = {name: value.replace("/run/secrets", str(mounted)) for name, value in environment.items()}
    return filled_in(described["command"], SETTINGS).split(), {**environment, "QSHARP_SECRETS_DIR": str(mounted)}


@contextmanager
def training(url: str, folder: Path) -> Iterator[None]:
    """The trainer, as a process beside the server."""
    words, environment = started_with("trainer", folder)
    words = [word.replace("/var/lib/qsharp", str(folder)) for word in words]
    assert environment.pop("QSHARP_URL") == "http://server:8000"
    environment["QSHARP_URL"] = url
    log = folder / "trainer.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "qsharp"), *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)
            print(log.read_text(errors="replace")[-4000:])  # shown if the check fails


def test_the_check_passes(tmp_path: Path) -> None:
    make_secrets.make(tmp_path / "secrets")
    user = (tmp_path / "secrets" / "vllm_api_key").read_text()
    (command, *words), environment = started_with("server", tmp_path)
    flags = [word.replace("/var/lib/qsharp", str(tmp_path)) for word in words]
    environment["QSHARP_KEYS"] = str(tmp_path / "keys.json")
    keys.add(tmp_path / "keys.json", "somebody")
    environment["QSHARP_ROLLOUTS"] = f"sqlite:///{tmp_path / 'rollouts.db'}"
    assert command == "serve"
    with ExitStack() as server:
        url = server.enter_context(serve(flags, tmp_path / "server.log", environment, grace=GRACE))
        with training(url, tmp_path):
            api = http_check.Api(url, user)
            http_check.keys(url, user)
            http_check.guided(api)
            http_check.learning(api)
            http_check.metrics(api.samples)
            took = http_check.drained(api, server.close)
    assert took < GRACE  # it ended by itself: `serve` kills after so many seconds
