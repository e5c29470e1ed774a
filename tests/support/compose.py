"""The files of `docker/` as compose reads them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).parents[2] / "docker"


def load(path: str) -> Any:
    return yaml.safe_load((DOCKER / path).read_text())


def filled_in(text: str, settings: Mapping[str, Any] | None = None) -> str:
    """With these settings, and nothing else set but what must be."""
    given = settings or {}
    return re.sub(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*|)\}", lambda match: str(given.get(match[1], match[2] or "")), text)
