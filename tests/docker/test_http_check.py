"""The part of the deployment's check that needs no Docker engine, against the processes that `compose.yaml` starts."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import http_check
from tests.support.compose import filled_in, load
from trainer.serving import serve

USER, GRACE = "user-secret", 90.0
SETTINGS = {**http_check.SETTINGS, "API_KEY": USER, "ADMIN_KEY": "admin-secret", "LOOK_SECONDS": 1}


def started_with(service: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a service of `compose.yaml`."""
    described = load("compose.yaml")["services"][service]
    environment = {name: filled_in(value, SETTINGS) for name, value in described["environment"].items()}
    return filled_in(described["command"], SETTINGS).split(), environment


@contextmanager
def training(url: str, folder: Path) -> Iterator[None]:
    """The trainer, as a process beside the server."""
    words, environment = started_with("trainer")
    words = [word.replace("http://server:8000", url).replace("/var/lib/qsharp", str(folder)) for word in words]
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
    (command, *words), environment = started_with("server")
    flags = [word.replace("/var/lib/qsharp", str(tmp_path)) for word in words]
    environment["QSHARP_ROLLOUTS"] = f"sqlite:///{tmp_path / 'rollouts.db'}"
    assert command == "serve"
    with ExitStack() as server:
        url = server.enter_context(serve(flags, tmp_path / "server.log", environment, grace=GRACE))
        with training(url, tmp_path):
            api = http_check.Api(url, USER)
            http_check.keys(url, USER)
            http_check.guided(api)
            http_check.learning(api)
            http_check.metrics(api.samples)
            took = http_check.drained(api, server.close)
    assert took < GRACE  # it ended by itself: `serve` kills after so many seconds
