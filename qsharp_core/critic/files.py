"""Reads files that somebody else has written: only regular ones, only so much, and only JSON that all readers take.

A critic's folder may come from anywhere. A pipe in the place of a file would never end, a symbolic link would lead to
files that are nobody's business, and JSON has corners that some readers take and others do not (NaN, a key twice).
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from pydantic import JsonValue

from qsharp_core.errors import CriticError

MOST_FILES = 1000
MOST_NESTED = 64
MOST_DIGITS = 18  # of an integer: JSON's readers agree on 64 bits
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def check_folder(folder: Path, most_bytes: float) -> None:
    """Refuses a folder that holds anything but regular files and folders, too many files, or too much.

    Symbolic links may lead to what is in the folder itself.

    Args:
        folder: where a critic is.
        most_bytes: that all its files may have together.

    Raises:
        CriticError: names the file.
    """
    try:
        root = folder.resolve(strict=True)
        total = 0
        for number, path in enumerate(_within(root)):
            if number == MOST_FILES:
                raise CriticError(f"{folder} holds more than {MOST_FILES} files: it is no critic's folder")
            _check_link(path, root)
            status = path.stat()
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise CriticError(f"{path} is no regular file")
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL in a path
        raise CriticError(f"{folder} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if total > most_bytes:
        raise CriticError(
            f"{folder} holds {total / 2**30:.3g} GiB, and a critic may have {most_bytes / 2**30:.3g}: see "
            "--critic-max-gib"
        )


def check_link(path: Path, folder: Path) -> None:
    """Refuses a symbolic link that leads out of a folder.

    Raises:
        CriticError: names the file.
    """
    try:
        _check_link(path, folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise CriticError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _check_link(path: Path, root: Path) -> None:
    if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root):
        raise CriticError(f"{path} leads out of the critic's folder: put the file itself there")


def _within(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                yield from _within(Path(entry.path))


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file.

    Args:
        path: of the file.
        most: how many bytes it may have.

    Raises:
        CriticError: it cannot be read, is no regular file, or is larger.
    """
    try:
        # A pipe without a writer is opened at once, and is seen to be one.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CriticError(f"{path} is no regular file")
            content = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise CriticError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > most:
        raise CriticError(f"{path} has more than {most} bytes")
    return content


def read_object(path: Path, most: int) -> dict[str, JsonValue]:
    """The JSON object in a file: in UTF-8, with numbers that are finite, every key once, not deeply nested.

    Args:
        path: of the file.
        most: how many bytes it may have.

    Raises:
        CriticError: names the file and what is wrong.
    """
    return parse_object(read_bytes(path, most), path)


def parse_object(content: bytes, path: Path) -> dict[str, JsonValue]:
    """The JSON object that a file's content is, as `read_object` wants it.

    Raises:
        CriticError: names the file and what is wrong.
    """
    try:
        text = content.decode("utf-8")
        if _depth(text) > MOST_NESTED:
            raise ValueError(f"is nested more than {MOST_NESTED} deep")
        value = json.loads(
            text, parse_constant=_refuse, parse_float=_float, parse_int=_int, object_pairs_hook=_each_key_once
        )
        if not isinstance(value, dict):
            raise ValueError("is no JSON object")
        # Half a character cannot be written into an answer. JSON's escapes make it from text that is UTF-8.
        if "\\u" in text and _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            raise ValueError("has half of a surrogate pair in a string")
    except (ValueError, RecursionError) as error:
        raise CriticError(f"{path}: {error}") from error
    return value


_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)


def _depth(text: str) -> int:
    """How deep brackets are nested. Counted before anything is parsed: parsers recurse."""
    depth = deepest = 0
    for bracket in re.finditer(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits:.20} is too large")
    return value


def _int(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"the integer {digits:.20}… has more than {MOST_DIGITS} digits")
    return int(digits)


def _each_key_once(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    found: dict[str, JsonValue] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"has the key {key!r:.80} twice")
        found[key] = value
    return found
