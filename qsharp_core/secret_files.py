"""Secrets from files, a file each, as Docker and Kubernetes mount them.

A secret in the environment shows in `docker inspect` and is handed to every child process; a file does neither.
pydantic-settings reads such a folder, too, but takes an empty file for an empty secret: an admin key that all know.
"""

import os
from pathlib import Path

from qsharp_core.errors import ConfigError

VARIABLE = "QSHARP_SECRETS_DIR"
MOUNTED = Path("/run/secrets")


def _folder() -> Path | None:
    """The folder of secret files: the one that `QSHARP_SECRETS_DIR` names, or /run/secrets, or None if there is none.

    Raises:
        ConfigError: `QSHARP_SECRETS_DIR` names no folder.
    """
    if not (given := os.environ.get(VARIABLE)):
        return MOUNTED if MOUNTED.is_dir() else None
    folder = Path(given)
    if not folder.is_dir():
        raise ConfigError(f"{VARIABLE} is no folder: {given}")
    return folder


def secret(name: str) -> str | None:
    """What the environment variable `name` holds, or else the file of that name in lower case; empty is None.

    Raises:
        ConfigError: `QSHARP_SECRETS_DIR` names no folder, or the file cannot be read.
    """
    if value := os.environ.get(name):
        return value
    if (folder := _folder()) is None:
        return None
    path = folder / name.lower()
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the secret in {path} cannot be read: {error}") from error
