"""Where `make compose-check` cannot run, it says in one line what is missing, and leaves everything as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.compose import DOCKER

# Docker's own answers; each call is noted.
FAKE = """#!/bin/sh
echo "$@" >> "$0.calls"
case "$1" in
compose) [ {compose} = yes ] || {{ echo "unknown flag: --progress" >&2; exit 125; }} ;;
*) echo "Cannot connect to the Docker daemon at unix:///var/run/docker.sock." >&2; exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("compose", "asked", "missing"),
    [
        (None, 0, "there is no `docker` in PATH: install Docker Engine"),
        ("no", 1, "`docker` has no recent Compose 2: install docker-compose-plugin"),
        ("yes", 2, "the Docker engine does not answer: start it"),
    ],
)
def test_what_is_missing(compose: str | None, asked: int, missing: str, tmp_path: Path) -> None:
    docker, calls = tmp_path / "docker", tmp_path / "docker.calls"
    if compose is not None:
        docker.write_text(FAKE.format(compose=compose))
        docker.chmod(0o755)
    command = [sys.executable, "-S", str(DOCKER / "compose_check.py")]  # -S: nothing but Python
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"FAILED: {missing}")
    assert done.stderr.count("\n") == 1
    assert (calls.read_text().count("\n") if calls.exists() else 0) == asked
