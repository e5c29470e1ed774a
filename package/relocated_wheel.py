"""The build backend: setuptools', but for where a wheel has the server and the trainer.

In the repository `server` and `trainer` are folders of their own, and so they are where it is installed with `-e`. In a
wheel they would be packages of those names in everybody's site-packages, where others of these names overwrite them,
and a `server.py` in the current folder hides them. So a wheel has them as `qsharp_serve.server` and
`qsharp_serve.trainer`: their files are moved, and every import, entry point and `module:attribute` that names one of
them is written anew. Nothing else in a file changes, and no line moves.

What a package index shows of the README has no relative links, neither in wheels nor in source distributions.
"""

import ast
import base64
import hashlib
import io
import re
import tarfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
)

from readme_links import without_relative_links

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist",
    "get_requires_for_build_wheel", "prepare_metadata_for_build_editable",
]  # fmt: skip

HOME = "qsharp_serve"
MOVED = ("server", "trainer")
NAMED = re.compile(rf"(?:{'|'.join(MOVED)})(?:\.\w+)+(?::\w+(?:\.\w+)*)?")  # as `server.plugin:QSharpEndpoints`
BEGUN = re.compile(rf"(?:{'|'.join(MOVED)})\.")
INIT = b'"""The server and the trainer of qsharp-serve, as `server` and `trainer` in its repository."""\n'
YEAR = (1980, 1, 1, 0, 0, 0)  # of every file: the same sources make the same wheel

Files = dict[str, bytes]


class RelocationError(Exception):
    """A module names another in a way that cannot be written anew."""


def build_wheel(wheel_directory: str, config_settings: object = None, metadata_directory: str | None = None) -> str:
    """PEP 517's hook: setuptools' wheel, with the server and the trainer inside `qsharp_serve`."""
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    path = Path(wheel_directory) / name
    with zipfile.ZipFile(path) as wheel:
        files = relocated({each.filename: wheel.read(each) for each in wheel.infolist() if not each.is_dir()})
    (record,) = [each for each in files if each.endswith(".dist-info/RECORD")]
    files[record] = _record(files, record)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for each, content in files.items():
            info = zipfile.ZipInfo(each, YEAR)
            info.external_attr = 0o100644 << 16
            wheel.writestr(info, content, zipfile.ZIP_DEFLATED)
    return name


def build_sdist(sdist_directory: str, config_settings: object = None) -> str:
    """PEP 517's hook: setuptools' source distribution, whose metadata have no relative links."""
    name: str = build_meta.build_sdist(sdist_directory, config_settings)
    path = Path(sdist_directory) / name
    with tarfile.open(path) as sdist:
        members = [(each, _content(sdist, each)) for each in sdist.getmembers()]
    with tarfile.open(path, "w:gz") as sdist:
        for member, content in members:
            if PurePosixPath(member.name).name == "PKG-INFO" and content is not None:
                content = without_relative_links(content.decode()).encode()
                member.size = len(content)
            sdist.addfile(member, None if content is None else io.BytesIO(content))
    return name


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    file = archive.extractfile(member)
    return None if file is None else file.read()


def relocated(files: Mapping[str, bytes]) -> Files:
    """The files of a wheel by their path, with the server and the trainer inside `qsharp_serve`.

    Raises:
        RelocationError: names the file and the line that cannot be written anew.
    """
    modules = set(_modules(files))
    moved = {f"{HOME}/__init__.py": INIT, f"{HOME}/py.typed": b""}
    for path, content in files.items():
        top = path.partition("/")[0]
        target = f"{HOME}/{path}" if top in MOVED else path
        if path.endswith(".py"):
            content = _renamed(content, path, modules)
        elif path.endswith(".dist-info/entry_points.txt"):
            content = re.sub(rf"(?m)(?<== )(?={NAMED.pattern}$)", f"{HOME}.", content.decode()).encode()
        elif path.endswith(".dist-info/top_level.txt"):
            names = {HOME if name in MOVED else name for name in content.decode().split()}
            content = "".join(f"{name}\n" for name in sorted(names)).encode()
        elif path.endswith(".dist-info/METADATA"):
            content = without_relative_links(content.decode()).encode()
        moved[target] = content
    return moved


def _modules(files: Mapping[str, bytes]) -> Iterator[str]:
    for path in files:
        if path.endswith(".py"):
            yield path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _renamed(source: bytes, path: str, modules: Collection[str]) -> bytes:
    """A module's source, with the new names in imports and in strings that are nothing but a name."""
    lines = source.splitlines(keepends=True)
    places: list[tuple[int, int]] = []  # line from 0, byte: where to put the new beginning of a name
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import() if any(_is_moved(alias.name) for alias in node.names):
                raise RelocationError(f"{path}:{node.lineno}: write `from … import`")
            case ast.ImportFrom(module=str(module), level=0) if _is_moved(module):
                found = re.compile(rb"from\s+").match(lines[node.lineno - 1], node.col_offset)
                assert found is not None
                places.append((node.lineno - 1, found.end()))
            case ast.Constant(value=str(text)) if NAMED.fullmatch(text) and text.partition(":")[0] in modules:
                line, column = node.lineno - 1, node.col_offset
                if lines[line][column + 1 : column + 1 + len(text)] != text.encode():
                    raise RelocationError(f"{path}:{node.lineno}: write {text!r} as one plain string")
                places.append((line, column + 1))
            case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]) if BEGUN.match(text):
                raise RelocationError(f"{path}:{node.lineno}: write names of modules in full")
            case _:
                pass
    for line, column in sorted(places, reverse=True):
        lines[line] = lines[line][:column] + f"{HOME}.".encode() + lines[line][column:]
    return b"".join(lines)


def _is_moved(module: str) -> bool:
    return module.partition(".")[0] in MOVED


def _record(files: Files, record: str) -> bytes:
    """PEP 376's list of files with their hashes and sizes."""

    def entry(path: str, content: bytes) -> str:
        if path == record:
            return f"{path},,\n"
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        return f"{path},sha256={digest},{len(content)}\n"

    return "".join(entry(path, content) for path, content in files.items()).encode()
