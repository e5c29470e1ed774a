"""Critics that a running server is asked to load, and texts that it is asked to score, by somebody who means it ill."""

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ADMIN_KEY, Server
from tests.support import bad_critics, models
from tests.support.bad_critics import Fault

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, headers=ADMIN) as made:
        yield made


@pytest.fixture(autouse=True)
def _served_as_before(http: httpx.Client) -> Iterator[None]:
    """Whatever was asked, the server has the critics that it had, and guides."""
    before = http.get("/v1/critics").json()["data"]
    yield
    assert [one["id"] for one in http.get("/v1/critics").json()["data"]] == [one["id"] for one in before]
    body = {"model": "tiny", "prompt": [*range(20, 40)], "max_tokens": 4, "eta": 0.1, "ignore_eos": True}
    guided = http.post("/v1/completions", json=body)
    assert guided.status_code == 200, guided.text
    assert guided.json()["choices"][0]["guidance"]["critic"] == "plain@1"


def refused(answer: httpx.Response, status: int = 400) -> str:
    """The message of a refusal."""
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


# One in ten of those that `core/critic/test_hostile.py` tries, so that each kind of spoiling is among them.
@pytest.mark.parametrize("fault", bad_critics.SEPARATE[::10], ids=lambda fault: fault.name)
def test_a_bad_separate_critic_is_400(http: httpx.Client, server: Server, tmp_path: Path, fault: Fault) -> None:
    folder = models.write_critic(server.root / f"bad-{tmp_path.name}", mlp=8, name="bad")
    fault.spoil(folder)
    began = time.monotonic()
    message = refused(http.post("/v1/critics", json={"path": str(folder)}))
    assert time.monotonic() - began < 10
    assert len(message) < 2000
    shutil.rmtree(folder)


@pytest.mark.parametrize("fault", bad_critics.NATIVE[5::10], ids=lambda fault: fault.name)
def test_a_bad_native_critic_is_400(http: httpx.Client, server: Server, tmp_path: Path, fault: Fault) -> None:
    folder = models.write_native_critic(server.root / f"bad-{tmp_path.name}", server.reference, name="bad", width=8)
    fault.spoil(folder)
    refused(http.post("/v1/critics", json={"path": str(folder)}))
    shutil.rmtree(folder)


def test_a_load_that_waits_for_a_file_holds_up_no_other(http: httpx.Client, server: Server) -> None:
    """The fault of `tests/support/faults` makes reading this folder hang; the server gives it up after some seconds."""
    stuck = models.write_critic(server.root / "stuck", name="stuck")
    good = models.write_critic(server.root / "beside", name="beside")
    messages: list[str] = []

    def load_stuck() -> None:
        with httpx.Client(base_url=server.url, timeout=60, headers=ADMIN) as client:
            messages.append(refused(client.post("/v1/critics", json={"path": str(stuck)})))

    thread = threading.Thread(target=load_stuck)
    thread.start()
    time.sleep(1)
    assert thread.is_alive()
    began = time.monotonic()
    assert http.post("/v1/critics", json={"path": str(good)}).status_code == 200
    assert time.monotonic() - began < 5
    assert http.delete("/v1/critics/beside/1").status_code == 200
    thread.join(60)
    assert "was given up" in messages[0]
    assert "still hangs" in refused(http.post("/v1/critics", json={"path": str(stuck)}))


# -- where from, and under which name


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A good critic that no root of the server has."""
    with tempfile.TemporaryDirectory() as folder:
        yield models.write_critic(Path(folder) / "elsewhere", name="elsewhere")


def test_only_folders_under_the_roots_are_loaded(http: httpx.Client, server: Server, elsewhere: Path) -> None:
    link = server.root / "link"
    link.symlink_to(elsewhere)
    for path in (elsewhere, link, server.root / ".." / "..", "/", "/proc/self", "/dev/zero", "relative"):
        message = refused(http.post("/v1/critics", json={"path": str(path)}), 403)
        assert message.startswith("path: ")
        assert "--critic-root" in message
    for bad in ("\0", "a\0b", str(server.root / "x\0y")):
        assert "path" in refused(http.post("/v1/critics", json={"path": bad}))
    assert refused(http.post("/v1/critics", json={"path": f"{server.root}/{'a' * 3000}"}))
    unfits: list[Any] = ["", "a" * 5000, 5, None, ["x"], {}]
    for unfit in unfits:
        answer = http.post("/v1/critics", json={"path": unfit})
        assert "path" in refused(answer)
        assert answer.json()["error"]["param"] == "body.path"
    inside = server.root / "inside"
    inside.symlink_to(models.write_critic(server.root / "inside-1", name="inside"))
    loaded = http.post("/v1/critics", json={"path": str(inside)})
    assert loaded.status_code == 200, loaded.text
    assert loaded.json()["path"] == str(server.root / "inside-1")
    assert http.delete("/v1/critics/inside/1").status_code == 200


BAD_NAMES = [
    "",
    "x/y",
    "../x",
    "..",
    ".x",
    "a@1",
    "a b",
    "a\n",
    "a\0",
    "é",
    "-a",
    "a" * 65,
    "a" * 2**20,
    5,
    True,
    ["a"],
    {},
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:12])
def test_a_name_that_is_none(http: httpx.Client, server: Server, name: Any) -> None:
    answer = http.post("/v1/critics", json={"path": str(server.critics["plain"]), "name": name})
    assert "name" in refused(answer)
    assert answer.json()["error"]["param"] == "body.name"
    answer = http.post("/v1/critics/plain/activate", json={"version": name})
    assert "version" in refused(answer)
    assert answer.json()["error"]["param"] == "body.version"


@pytest.mark.parametrize("name", ["a@1", "a%20b", "%00", "%2e%2ex", "-a", "%C3%A9", "a" * 65])
def test_a_path_with_a_name_that_is_none(http: httpx.Client, name: str) -> None:
    for answer, field in (
        (http.get(f"/v1/critics/{name}"), "name"),
        (http.post(f"/v1/critics/{name}/activate", json={"version": "1"}), "name"),
        (http.post(f"/v1/critics/{name}/rollback"), "name"),
        (http.delete(f"/v1/critics/{name}/1"), "name"),
        (http.delete(f"/v1/critics/plain/{name}"), "version"),
    ):
        assert field in refused(answer)
        assert answer.json()["error"]["param"] == f"path.{field}"


def test_a_name_of_the_longest_kind(http: httpx.Client, server: Server) -> None:
    name = "A9._-" + "a" * 59
    body = {"path": str(server.critics["plain"]), "name": name}
    loaded = http.post("/v1/critics", json=body)
    assert loaded.status_code == 200, loaded.text
    assert http.get(f"/v1/critics/{name}").json()["versions"][0]["id"] == f"{name}@1"
    assert http.delete(f"/v1/critics/{name}/1").status_code == 200


# -- texts to score


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "body.prompt"),
        ({"prompt": "a"}, "body.completion"),
        ({"prompt": None, "completion": None}, "body.prompt"),
        ({"prompt": 5, "completion": 5}, "body.prompt"),
        ({"prompt": "a", "completion": []}, "completion"),
        ({"prompt": [], "completion": "a"}, "completion"),
        ({"prompt": ["a", "b"], "completion": ["c"]}, "completion"),
        ({"prompt": [30, "a"], "completion": [31]}, "body.prompt"),
        ({"prompt": [[30], "a"], "completion": [31]}, "body.prompt"),
        ({"prompt": [[30], 31], "completion": [31]}, "body.prompt"),
        ({"prompt": [[[30]]], "completion": [31]}, "body.prompt"),
        ({"prompt": [-1], "completion": [31]}, "body.prompt"),
        ({"prompt": [True], "completion": [31]}, "body.prompt"),
        ({"prompt": [1.5], "completion": [31]}, "body.prompt"),
        ({"prompt": [30], "completion": [models.VOCAB]}, "completion"),
        ({"prompt": [2**63], "completion": [31]}, "prompt"),
        ({"prompt": [10**30], "completion": [31]}, "prompt"),
        ({"prompt": [30], "completion": [[31]] * 1025}, "completion"),
        ({"prompt": [30], "completion": [[]] * 100_000}, "completion"),
        ({"prompt": [30] * 600, "completion": [31] * 600}, "completion"),
        ({"prompt": "a", "completion": "b", "more": 1}, "body.more"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_text_that_cannot_be_scored_is_400(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/critics/plain/score", json=body)
    refused(answer)
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("half", [r"\ud800", r"a\udfffb"])
@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_half_a_character_is_400(http: httpx.Client, field: str, half: str) -> None:
    other = "completion" if field == "prompt" else "prompt"
    content = f'{{"{field}": "{half}", "{other}": "a"}}'
    answer = http.post("/v1/critics/plain/score", content=content, headers={"Content-Type": "application/json"})
    assert field in refused(answer)
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("prompt", "completion", "lengths"),
    [
        ([], [], [0]),
        ("", "", [0]),
        ("a", "", [0]),
        ([30], [], [0]),
        ([30], [[], [31], []], [0, 1, 0]),
        ([[], [30]], [[], [31]], [0, 1]),
        ([], [31, 32], [2]),
        ("", "ab", [2]),
        ([30], [[31]] * 1024, [1] * 1024),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_nothing_and_much_are_scored(http: httpx.Client, prompt: Any, completion: Any, lengths: list[int]) -> None:
    answer = http.post("/v1/critics/plain/score", json={"prompt": prompt, "completion": completion})
    assert answer.status_code == 200, answer.text
    assert [len(one["values"]) for one in answer.json()["data"]] == lengths


def test_a_q_head_scores_what_follows_a_token(http: httpx.Client) -> None:
    answer = http.post("/v1/critics/fast/score", json={"prompt": [], "completion": [31]})
    assert "prompt must not be empty" in refused(answer)
    assert answer.json()["error"]["param"] == "prompt"
    assert http.post("/v1/critics/fast/score", json={"prompt": [], "completion": []}).json()["data"][0]["values"] == []
