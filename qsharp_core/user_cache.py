"""The folder in the user's cache where this project keeps what it can make, or fetch, again."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/qsharp-serve`, or `~/.cache/qsharp-serve`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qsharp-serve"
