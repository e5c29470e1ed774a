"""What a critic's folder holds, as one digest: two folders with the same files have the same."""

import hashlib
import math
from pathlib import Path

from qsharp_core.critic.files import check_folder
from qsharp_core.errors import CriticError


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(folder: Path) -> str:
    """SHA-256 of a critic's files, in hexadecimal: of their names within its folder, and of their contents.

    Raises:
        CriticError: the folder is no critic's, or cannot be read.
    """
    check_folder(folder, math.inf)  # of any size: whoever loads it has a limit
    total = hashlib.sha256()
    try:
        files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
        for name, path in files:
            content = file_digest(path)
            total.update(f"{len(name.encode())} {name} {content}\n".encode())
    except OSError as error:
        raise CriticError(f"{folder} cannot be read: {error.strerror or error}") from error
    return total.hexdigest()
