"""The page /playground: where it is shown, and what its headers let it do. `e2e/test_playground.py` uses it."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from server.api import playground
from server.api.playground import FOLDER
from server.commands import serve

QUOTED = re.compile(r"""(?:from|import|src=|href=)\s*["']([^"']+)["']""")


def app_of(*flags: str, root_path: str = "") -> FastAPI:
    app = FastAPI(root_path=root_path)
    playground.attach(app, serve.parse(["model", *flags]))
    return app


def get(app: FastAPI, path: str, method: str = "GET") -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path)

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ((), True),  # without keys it listens to this host alone
        (("--host", "localhost"), True),
        (("--no-playground",), False),
        (("--api-key", "k"), False),
        (("--api-key", "k", "--host", "127.0.0.1"), True),
        (("--api-key", "k", "--playground"), True),
        (("--no-auth", "--host", "0.0.0.0"), False),
        (("--uds", "/tmp/socket"), False),
    ],
)
def test_it_is_shown_to_this_host_alone_unless_a_flag_says_otherwise(flags: tuple[str, ...], shown: bool) -> None:
    app = app_of(*flags)
    assert (get(app, "/playground/").status_code == 200) is shown
    assert (get(app, "/").status_code == 307) is shown


def test_a_variable_says_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSHARP_PLAYGROUND", "false")
    assert get(app_of(), "/playground/").status_code == 404
    assert get(app_of("--playground"), "/playground/").status_code == 200


def test_the_hint_names_it_where_it_is_shown() -> None:
    assert "http://localhost:8123/\n" in serve.parse(["star-graph", "--port", "8123"]).qsharp_hint
    assert (
        "http://localhost:8123/\n" not in serve.parse(["star-graph", "--port", "8123", "--no-playground"]).qsharp_hint
    )


@pytest.mark.parametrize("root_path", ["", "/behind/a/proxy"])
@pytest.mark.parametrize("path", ["/", "/playground"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_other_paths_lead_there(root_path: str, path: str, method: str) -> None:
    response = get(app_of(root_path=root_path), f"{root_path}{path}", method)
    assert response.status_code == 307
    assert response.headers["location"] == f"{root_path}/playground/"


def test_every_file_has_the_headers_and_its_type() -> None:
    app = app_of()
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert len(files) > 15
    types = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
    for path in files:
        response = get(app, f"/playground/{path.relative_to(FOLDER)}")
        assert response.content == path.read_bytes()
        assert response.headers["content-type"].startswith(types.get(path.suffix, "text/plain"))
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert get(app, "/playground/../settings.py").status_code == 404
    assert get(app, "/playground/%2e%2e/settings.py").status_code == 404


def test_nothing_is_named_that_is_not_there() -> None:
    """Neither a module nor a file, nor anything of another host."""
    for path in [*FOLDER.glob("*.js"), FOLDER / "index.html", *FOLDER.glob("vendor/*.js")]:
        for name in QUOTED.findall(path.read_text()):
            if not name.startswith(("../", "#")):  # the server's own pages, and places within this one
                assert (path.parent / name).is_file(), (path.name, name)


def test_libraries_have_their_licences() -> None:
    licences = (FOLDER / "vendor" / "LICENSES.txt").read_text()
    notice = (Path(FOLDER).parents[1] / "NOTICE").read_text()
    for path in FOLDER.glob("vendor/*.js"):
        assert path.name in licences
        assert f"vendor/{path.name}" in notice
