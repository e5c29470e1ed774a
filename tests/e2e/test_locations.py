"""Critics from an object store guide as those from a disk do: named at start, loaded over HTTP, and after a restart."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ADMIN_KEY, flags
from tests.support import models
from tests.support.object_store import Store, object_store
from trainer.serving import serve

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
BODY = {"model": "tiny", "prompt": [*range(20, 40)], "max_tokens": 8, "ignore_eos": True, "eta": 0.05, "seed": 7}


@pytest.fixture
def store() -> Iterator[Store]:
    with object_store() as made:
        yield made


def guided(http: httpx.Client, critic: str) -> tuple[str, str]:
    """The text that a critic leads to, and the version that it was."""
    body: dict[str, Any] = {**BODY, "guidance": {"critic": critic}}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["text"], choice["guidance"]["critic"]


def load(http: httpx.Client, path: object, **more: Any) -> httpx.Response:
    return http.post("/v1/critics", json={"path": str(path), **more})


def test_critics_from_an_object_store(store: Store, tmp_path: Path) -> None:
    reference = models.write_reference(tmp_path / "reference")
    made = {
        number: models.write_critic(tmp_path / number, name="sums", version=number, seed=int(number)) for number in "12"
    }
    there = {number: store.upload(folder, store.root / "sums" / number) for number, folder in made.items()}
    arguments = [
        *flags(reference, {}, rows=8, blocks=24), "--critic", str(there["1"]), "--critic-root", str(tmp_path),
        "--critic-root", str(store.root), "--critic-cache-folder", str(tmp_path / "cache"),
        "--rollouts", f"sqlite:///{tmp_path / 'rollouts.db'}", "--critic-load-seconds", "60",
    ]  # fmt: skip
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with (
        serve(arguments, tmp_path / "log", environment) as url,
        httpx.Client(base_url=url, timeout=120, headers=ADMIN) as http,
    ):
        (listed,) = http.get("/v1/critics").json()["data"]
        assert (listed["id"], listed["path"]) == ("sums@1", str(there["1"]))
        first = guided(http, "sums")
        assert first[1] == "sums@1"
        loaded = load(http, there["2"], activate=True)
        assert loaded.status_code == 200, loaded.text
        assert (loaded.json()["id"], loaded.json()["path"]) == ("sums@2", str(there["2"]))
        second = guided(http, "sums")
        assert second[1] == "sums@2"
        assert second[0] != first[0]
        for number, (text, _) in (("1", first), ("2", second)):  # the same as from a disk
            assert load(http, made[number], name=f"local{number}").status_code == 200
            assert guided(http, f"local{number}")[0] == text
            assert http.delete(f"/v1/critics/local{number}/{number}").is_success

        for path, status, says in (
            (f"{store.root}-evil/sums/1", 403, "--critic-root URL"),
            (f"{store.root}/../sums/1", 400, "path: "),
            ("gs://bucket/sums/1", 403, "--critic-root URL"),
            (store.root / "sums" / "3", 400, "has no critic.json"),
        ):
            answer = load(http, path)
            assert (answer.status_code, says in answer.text) == (status, True), answer.text
        with store.asking_for_rights():
            assert "refuses these credentials" in load(http, there["1"], name="again").json()["error"]["message"]

    # Started again without the store: it has what the others are to have, from its cache.
    store.remove(store.root)
    del arguments[arguments.index("--critic") : arguments.index("--critic") + 2]
    with (
        serve(arguments, tmp_path / "log", environment) as url,
        httpx.Client(base_url=url, timeout=120, headers=ADMIN) as http,
    ):
        assert guided(http, "sums") == second
        assert guided(http, "sums@1") == first
        assert http.get("/v1/critics").json()["wanted"]["problems"] == {}
