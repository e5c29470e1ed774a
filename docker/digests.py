"""Pins the images of `images.yaml` by digest: `make renew-digests`.

    python3 docker/digests.py [--check] [--file FILE]        needs the registries, and nothing but Python

Each tag is asked for in its registry (HTTP API v2, with an anonymous token where the registry wants one). The digest is
computed from the manifest that came, not taken on trust. Either all images are pinned or the file stays as it is. With
`--check` nothing is written, and the exit status says whether something is unpinned or has moved.
"""

import argparse
import hashlib
import json
import re
import sys
import time
from dataclasses import dataclass
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

IMAGES = Path(__file__).parent / "images.yaml"
REFERENCE = re.compile(r"^( +(?:image|\w+_BASE): )([^\s@]+)(?:@(sha256:[0-9a-f]{64}))?$", re.MULTILINE)
HUB = "registry-1.docker.io"
# Lists of one image for several processors come first: their digest holds on all of them.
MANIFESTS = ", ".join(
    [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ]
)
LARGEST = 4 << 20  # bytes of a manifest: what the specification has registries accept
TRIES = 5
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries; doubled each time, or what the registry asks for
TIMEOUT = 30.0
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


class RegistryError(Exception):
    """A registry did not say what an image's digest is."""


class Answer(NamedTuple):
    """Of a registry."""

    status: int
    headers: Any
    body: bytes


@dataclass(frozen=True)
class Image:
    """Where a tag is to be asked for."""

    registry: str
    repository: str
    tag: str

    @classmethod
    def parse(cls, reference: str) -> "Image":
        """From how Docker writes it: `NAME:TAG`, `OWNER/NAME:TAG` or `HOST[:PORT]/NAME:TAG`.

        Raises:
            RegistryError: it has no tag.
        """
        first, slash, rest = reference.partition("/")
        host = slash and ("." in first or ":" in first or first == "localhost")
        path, colon, tag = (rest if host else reference).partition(":")
        if not colon:
            raise RegistryError(f"{reference}: has no tag")
        if host and first not in ("docker.io", "index.docker.io"):
            return cls(first, path, tag)
        return cls(HUB, path if "/" in path else f"library/{path}", tag)

    @property
    def url(self) -> str:
        """Of its manifest; over plain HTTP from this machine alone, as Docker does."""
        scheme = "http" if _is_loopback(self.registry) else "https"
        return f"{scheme}://{self.registry}/v2/{self.repository}/manifests/{self.tag}"


def _is_loopback(registry: str) -> bool:
    host = urlsplit(f"//{registry}").hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def digest_of(image: Image) -> str:
    """The digest of what a tag is now.

    Raises:
        RegistryError
    """
    answer = _get(image.url, {"Accept": MANIFESTS})
    if answer.status == 401:
        token = _token(image, answer.headers.get("WWW-Authenticate", ""))
        answer = _get(image.url, {"Accept": MANIFESTS, "Authorization": f"Bearer {token}"})
    if answer.status != 200:
        raise RegistryError(f"{image.url} answered {answer.status}: {_said(answer)}")
    digest = f"sha256:{hashlib.sha256(answer.body).hexdigest()}"
    claimed = answer.headers.get("Docker-Content-Digest", digest)
    if claimed != digest:
        raise RegistryError(f"{image.url}: the manifest has digest {digest}, but the registry says {claimed}")
    try:
        kind = json.loads(answer.body).get("schemaVersion")
    except (ValueError, AttributeError):
        kind = None
    if kind != 2:
        raise RegistryError(f"{image.url}: the answer is no manifest: {_said(answer)}")
    return digest


def _token(image: Image, challenge: str) -> str:
    """An anonymous token to read with, from where the registry's challenge says."""
    scheme, _, rest = challenge.partition(" ")
    parameters = dict(re.findall(r'(\w+)="([^"]*)"', rest))
    realm = parameters.pop("realm", "")
    if scheme.lower() != "bearer" or not realm:
        raise RegistryError(f"{image.registry} wants something else than a token: {challenge!r}")
    if urlsplit(realm).scheme != "https" and not _is_loopback(urlsplit(realm).netloc):
        raise RegistryError(f"{image.registry} wants a token from {realm}, which is not HTTPS")
    asked = {"scope": f"repository:{image.repository}:pull"}
    if "service" in parameters:
        asked["service"] = parameters["service"]
    answer = _get(f"{realm}?{urlencode(asked)}", {})
    try:
        said = json.loads(answer.body)
        token = said.get("token") or said["access_token"]
    except (ValueError, KeyError, AttributeError) as error:
        raise RegistryError(f"{realm} answered {answer.status} and gave no token: {_said(answer)}") from error
    return str(token)


def _get(url: str, headers: dict[str, str]) -> Answer:
    """The answer to a GET; tried again where another try may have another answer."""
    pause, last = FIRST_PAUSE, ""
    for left in reversed(range(TRIES)):
        request = Request(url)
        for name, value in headers.items():
            request.add_unredirected_header(name, value) if name == "Authorization" else request.add_header(name, value)
        wait = pause
        try:
            with urlopen(request, timeout=TIMEOUT) as found:
                body = found.read(LARGEST + 1)
                if len(body) > LARGEST:
                    raise RegistryError(f"{url} answered more than {LARGEST} bytes")
                return Answer(found.status, found.headers, body)
        except HTTPError as error:
            with error:
                answer = Answer(error.code, error.headers, error.read(LARGEST))
            if answer.status not in TRANSIENT:
                return answer
            last = f"answered {answer.status}"
            asked = answer.headers.get("Retry-After", "")
            wait = max(pause, float(asked)) if asked.isdigit() else pause
        except (URLError, HTTPException, OSError) as error:
            last = str(getattr(error, "reason", error))
        if left:
            time.sleep(min(wait, LONGEST_PAUSE))
            pause *= 2
    raise RegistryError(f"{url}: {last} ({TRIES} tries)")


def _said(answer: Answer) -> str:
    return answer.body[:200].decode(errors="replace").strip()


def renew(file: Path, check: bool) -> bool:
    """Pins the images of a file; whether something was unpinned or had moved.

    Raises:
        RegistryError: nothing was written.
    """
    text = file.read_text()
    pinned = {match[2]: match[3] for match in REFERENCE.finditer(text)}
    now = {reference: digest_of(Image.parse(reference)) for reference in pinned}
    for reference, digest in now.items():
        match pinned[reference]:
            case None:
                print(f"{reference}: {'is not pinned; it is' if check else 'pinned to'} {digest}")
            case before if before != digest:
                print(f"{reference}: {'has moved' if check else 'moved'} from {before} to {digest}")
            case _:
                print(f"{reference}: still {digest}")
    changed = now != pinned
    if changed and not check:
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text(REFERENCE.sub(lambda match: f"{match[1]}{match[2]}@{now[match[2]]}", text))
        temporary.replace(file)
    return changed


def main(argv: list[str] | None = None) -> int:
    """Exit status: 1 if a digest cannot be had, or if `--check` finds something to renew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a pin is missing or old")
    parser.add_argument("--file", type=Path, default=IMAGES, help="default: docker/images.yaml")
    args = parser.parse_args(argv)
    try:
        changed = renew(args.file, args.check)
    except RegistryError as error:
        print(f"nothing was changed: {error}", file=sys.stderr)
        return 1
    return int(changed and args.check)


if __name__ == "__main__":
    sys.exit(main())
