"""The files of `docker/` as compose reads them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).parents[2] / "docker"
RESET = object()


class _Loader(yaml.SafeLoader):
    """Knows compose's `!reset`: what the files before say is taken back."""


_Loader.add_constructor("!reset", lambda loader, node: RESET)


def load(path: str) -> Any:
    return yaml.load((DOCKER / path).read_text(), _Loader)


def merged(*paths: str) -> Any:
    """Several files as `docker compose -f … -f …` merges them: mappings by key, lists end to end, commands anew."""
    result: Any = {}
    for path in paths:
        result = _merge(result, load(path))
    return result


def _merge(before: Any, after: Any, key: str = "") -> Any:
    if key == "networks" and isinstance(before, list):
        before = dict.fromkeys(before)
    if isinstance(before, dict) and isinstance(after, dict):
        both = {name: _merge(before.get(name), value, name) for name, value in after.items()}
        return {name: value for name, value in {**before, **both}.items() if value is not RESET}
    if isinstance(before, list) and isinstance(after, list) and key not in ("command", "test"):
        return [*before, *after]
    return after


def filled_in(text: str, settings: Mapping[str, Any] | None = None) -> str:
    """With these settings, and nothing else set but what must be."""
    given = settings or {}
    return re.sub(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*|)\}", lambda match: str(given.get(match[1], match[2] or "")), text)
