"""Where a critic's folder is: on this machine's disk, or in an object store, at a URL that fsspec knows.

    critics/sums/3      file:///srv/critics/sums/3                           a `Path`
    s3://bucket/critics/sums/3      gs://bucket/critics/sums/3      hf://org/repo/sums/3      a `RemoteFolder`

Locations are compared before anything is read from them, so a URL has one spelling alone: no `.`, `..`, empty part,
escape, query or user in it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import PlainSerializer, PlainValidator

_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PART = re.compile(r"[A-Za-z0-9._@=+~-]+", re.ASCII)
_LISTED = re.compile(rf"(?:{_PROTOCOL.pattern})?[^:]+")
LOCAL = ("file", "local")


@dataclass(frozen=True)
class RemoteFolder:
    """A folder in an object store. It is made of names as a `Path` is: `folder / "sums" / "3"`.

    Attributes:
        protocol: what fsspec knows the store by: `s3`, `gs`, `hf`.
        parts: the bucket, and the names of the folders in it; without any it is all that the protocol reaches.
    """

    protocol: str
    parts: tuple[str, ...]

    @classmethod
    def of(cls, url: str) -> Self:
        """The folder at a URL.

        Raises:
            ValueError: it is no URL, or could be read in two ways.
        """
        matched = _PROTOCOL.match(url)
        if matched is None:
            raise ValueError(f"{url!r:.200} is no URL of a folder, as s3://BUCKET/FOLDER is")
        rest = url[matched.end() :].removesuffix("/")
        parts = tuple(rest.split("/")) if rest else ()
        if wrong := next((part for part in parts if not _is_name(part)), None):
            raise ValueError(
                f"{url!r:.200}: {wrong!r:.80} is no name in a URL of a critic: letters, digits and . _ @ = + ~ - make "
                "one, but for '.' and '..'"
            )
        if "" in parts:
            raise ValueError(f"{url!r:.200} has two slashes in a row")
        return cls(matched[1].lower(), parts)

    def __str__(self) -> str:
        return f"{self.protocol}://{'/'.join(self.parts)}"

    def __truediv__(self, more: str | Path) -> "RemoteFolder":
        return RemoteFolder.of(f"{str(self).removesuffix('/')}/{more}" if self.parts else f"{self}{more}")

    @property
    def name(self) -> str:
        """The last of its names."""
        return self.parts[-1] if self.parts else ""

    @property
    def parent(self) -> "RemoteFolder":
        """The folder that it is in."""
        return RemoteFolder(self.protocol, self.parts[:-1])

    def is_relative_to(self, other: "RemoteFolder") -> bool:
        """Whether it is the other folder, or in it."""
        return self.protocol == other.protocol and self.parts[: len(other.parts)] == other.parts


def _is_name(part: str) -> bool:
    return not part or (_PART.fullmatch(part) is not None and part not in (".", ".."))


Location = Path | RemoteFolder


def is_url(text: str) -> bool:
    """Whether a text is a URL and no path."""
    return _PROTOCOL.match(text) is not None


def parse_location(text: str | Location) -> Location:
    """A path, or the folder at a URL; `file://` is a path, too.

    Raises:
        ValueError: a URL that is none of a folder.
    """
    if not isinstance(text, str):
        return text
    matched = _PROTOCOL.match(text)
    if matched is None:
        return Path(text)
    if matched[1].lower() not in LOCAL:
        return RemoteFolder.of(text)
    path = text[matched.end() :]
    if not path.startswith("/"):
        raise ValueError(f"{text!r:.200}: a folder of this machine is file:///FOLDER, with three slashes")
    return Path(path)


def split_locations(text: str) -> list[str]:
    """Splits paths and URLs with colons between them; the colon of a URL's protocol parts nothing."""
    return [matched[0] for matched in _LISTED.finditer(text)]


def _validated(value: object) -> Location:
    if not isinstance(value, str | Location):
        raise ValueError("must be a folder, or the URL of one")
    return parse_location(value)


LocationField = Annotated[Location, PlainValidator(_validated), PlainSerializer(str)]
"""A location as a field of a model; in JSON it is a path or a URL."""
