"""Pinning images, against an HTTP server that answers as registries do."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

import digests
from digests import HUB, Image, RegistryError
from tests.support.compose import load

INDEX = "application/vnd.oci.image.index.v1+json"
TOKEN = "anonymous-token"


@dataclass
class Registry:
    """What it has, and what happened to it.

    Attributes:
        manifests: by `REPOSITORY:TAG`.
        failures: statuses to answer first, each once; 0 closes the connection without an answer.
        claimed: the digest that it names, if not the right one.
        asked: paths of manifests, and the scope of tokens.
    """

    manifests: dict[str, bytes]
    guarded: bool = True
    failures: list[int] = field(default_factory=list)
    claimed: str | None = None
    realm: str | None = None
    asked: list[str] = field(default_factory=list)
    host: str = ""

    def digest(self, image: str) -> str:
        return f"sha256:{hashlib.sha256(self.manifests[image]).hexdigest()}"


def handler(registry: Registry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if registry.failures and (status := registry.failures.pop(0)) != 200:
                if status:
                    self.answer(status, b"not now", {"Retry-After": "0"})
                return  # without an answer the connection is closed
            if url.path == "/token":
                query = parse_qs(url.query)
                registry.asked.append(query["scope"][0])
                assert query["service"] == ["the registry"]
                self.answer(200, json.dumps({"token": TOKEN}).encode(), {})
                return
            registry.asked.append(url.path)
            assert INDEX in self.headers["Accept"]
            if registry.guarded and self.headers["Authorization"] != f"Bearer {TOKEN}":
                realm = registry.realm or f"http://{registry.host}/token"
                challenge = f'Bearer realm="{realm}",service="the registry",scope="repository:any:pull"'
                self.answer(401, b'{"errors": [{"code": "UNAUTHORIZED"}]}', {"WWW-Authenticate": challenge})
                return
            _, _, *repository, _, tag = url.path.split("/")
            body = registry.manifests.get(f"{'/'.join(repository)}:{tag}")
            if body is None:
                self.answer(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}', {})
                return
            digest = registry.claimed or f"sha256:{hashlib.sha256(body).hexdigest()}"
            self.answer(200, body, {"Content-Type": INDEX, "Docker-Content-Digest": digest})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def manifest(about: str) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [], "annotations": {"": about}}).encode()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setattr(digests, "FIRST_PAUSE", 0.01)
    registry = Registry({"library/one:1": manifest("one"), "owner/two:v2": manifest("two")})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(registry))
    registry.host = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield registry
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def images(registry: Registry, tmp_path: Path) -> Path:
    """A file as `images.yaml`."""
    path = tmp_path / "images.yaml"
    path.write_text(
        "# two images\nservices:\n"
        f"  server:\n    build:\n      args:\n        CPU_BASE: {registry.host}/library/one:1\n"
        f"  two:\n    image: {registry.host}/owner/two:v2\n"
    )
    return path


def run(images: Path, *flags: str) -> int:
    return digests.main(["--file", str(images), *flags])


def test_images_are_pinned_and_renewed(registry: Registry, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, one, two = images.read_text(), registry.digest("library/one:1"), registry.digest("owner/two:v2")
    assert run(images, "--check") == 1
    assert images.read_text() == before
    assert f"one:1: is not pinned; it is {one}" in capsys.readouterr().out

    assert run(images) == 0
    pinned = images.read_text()
    assert pinned == before.replace("one:1", f"one:1@{one}").replace("two:v2", f"two:v2@{two}")
    assert f"two:v2: pinned to {two}" in capsys.readouterr().out
    assert registry.asked.count("repository:owner/two:pull") == 2
    assert (run(images, "--check"), run(images)) == (0, 0)
    assert images.read_text() == pinned

    registry.manifests["owner/two:v2"] = manifest("a newer two")
    newer = registry.digest("owner/two:v2")
    capsys.readouterr()
    assert run(images, "--check") == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{registry.host}/library/one:1: still {one}",
        f"{registry.host}/owner/two:v2: has moved from {two} to {newer}",
    ]
    assert images.read_text() == pinned
    assert run(images) == 0
    assert images.read_text() == pinned.replace(two, newer)
    assert [path.name for path in images.parent.iterdir()] == ["images.yaml"]


def test_a_registry_without_tokens(registry: Registry, images: Path) -> None:
    registry.guarded = False
    assert run(images) == 0
    assert registry.asked == ["/v2/library/one/manifests/1", "/v2/owner/two/manifests/v2"]


@pytest.mark.parametrize("failures", [[429], [503, 502], [0], [200, 500], [200, 200, 429, 0], [500] * 4])
def test_what_fails_for_a_while_is_tried_again(registry: Registry, images: Path, failures: list[int]) -> None:
    registry.failures = failures
    assert run(images) == 0
    assert registry.failures == []
    assert images.read_text().count("@sha256:") == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"failures": [500] * digests.TRIES}, "answered 500 (5 tries)"),
        ({"failures": [200] * 3 + [0] * digests.TRIES}, "(5 tries)"),  # the second image alone: none is pinned
        ({"manifests": {"library/one:1": manifest("one")}}, "answered 404: {\"errors\""),
        ({"claimed": "sha256:" + "0" * 64}, "but the registry says sha256:" + "0" * 64),
        ({"manifests": {"library/one:1": b"<html>"}}, "the answer is no manifest: <html>"),
        ({"manifests": {"library/one:1": b'{"schemaVersion": 1}'}}, "the answer is no manifest"),
        ({"manifests": {"library/one:1": b" " * (digests.LARGEST + 1)}}, "answered more than"),
        ({"realm": "http://elsewhere.example/token"}, "http://elsewhere.example/token, which is not HTTPS"),
    ],
)  # fmt: skip
def test_without_an_answer_nothing_is_written(
    registry: Registry, images: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], said: str
) -> None:
    for name, value in change.items():
        setattr(registry, name, value)
    before = images.read_text()
    assert run(images) == 1
    assert images.read_text() == before
    error = capsys.readouterr().err
    assert error.startswith("nothing was changed: ")
    assert said in error


def test_nobody_answers(images: Path, capsys: pytest.CaptureFixture[str], registry: Registry) -> None:
    images.write_text(images.read_text().replace(registry.host, "127.0.0.1:1"))
    assert run(images) == 1
    assert "Connection refused (5 tries)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reference", "image"),
    [
        ("postgres:17-bookworm", Image(HUB, "library/postgres", "17-bookworm")),
        ("prom/prometheus:v3.5.0", Image(HUB, "prom/prometheus", "v3.5.0")),
        ("docker.io/prom/prometheus:v3", Image(HUB, "prom/prometheus", "v3")),
        ("docker.io/postgres:17", Image(HUB, "library/postgres", "17")),
        ("quay.io/a/b/c:1", Image("quay.io", "a/b/c", "1")),
        ("localhost:5000/a:1", Image("localhost:5000", "a", "1")),
    ],
)
def test_references_are_read_as_docker_does(reference: str, image: Image) -> None:
    assert Image.parse(reference) == image
    assert image.url.startswith(
        "http://localhost:5000/v2/" if "localhost" in reference else f"https://{image.registry}"
    )


@pytest.mark.parametrize("reference", ["postgres", "localhost:5000/postgres", "quay.io/a/b"])
def test_a_reference_without_a_tag_is_refused(reference: str) -> None:
    with pytest.raises(RegistryError, match="has no tag"):
        Image.parse(reference)


def test_all_images_of_the_deployment_are_found() -> None:
    services = load("images.yaml")["services"]
    named = list(services["server"]["build"]["args"].values())
    named += [service["image"] for service in services.values() if "image" in service]
    found = [match[2] for match in digests.REFERENCE.finditer(digests.IMAGES.read_text())]
    assert found == [reference.partition("@")[0] for reference in named]
    for reference in found:
        assert Image.parse(reference).registry == HUB
