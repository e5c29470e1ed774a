import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import make_url

import make_secrets
from tests.support.compose import DOCKER, load


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_every_secret_of_the_deployment_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    command = [sys.executable, "-S", str(DOCKER / "make_secrets.py"), str(folder)]  # -S: nothing but Python
    said = subprocess.run(command, capture_output=True, text=True, check=True, umask=0o077).stdout
    made = contents(folder)
    assert made.keys() == load("compose.yaml")["secrets"].keys()
    assert made.pop("hf_token") == ""
    assert all(len(value) >= 48 for value in made.values())
    assert len(set(made.values())) == len(made)
    assert not any(value in said for value in made.values())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}  # other users read them in containers
    url = make_url(made["qsharp_rollouts"])
    assert (url.host, url.username, url.database) == ("postgres", "qsharp", "qsharp")
    assert url.password == made["postgres_password"]
    environment = load("compose.yaml")["services"]["postgres"]["environment"]
    assert (environment["POSTGRES_USER"], environment["POSTGRES_DB"]) == ("qsharp", "qsharp")


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "postgres_password").write_text("mine\n")
    assert "postgres_password" not in make_secrets.make(tmp_path)
    made = contents(tmp_path)
    assert made["postgres_password"] == "mine\n"
    assert made["qsharp_rollouts"] == "postgresql://qsharp:mine@postgres/qsharp"
    assert make_secrets.make(tmp_path) == []
    (tmp_path / "vllm_api_key").unlink()
    assert make_secrets.make(tmp_path) == ["vllm_api_key"]
    assert contents(tmp_path)["vllm_api_key"] != made["vllm_api_key"]


def test_an_empty_password_is_refused(tmp_path: Path) -> None:
    (tmp_path / "postgres_password").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        make_secrets.make(tmp_path)
