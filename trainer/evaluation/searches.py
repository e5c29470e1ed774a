"""A search as a command line and a recipe spell it: `KIND:FIELD=VALUE,…`.

    best_of:n=8,by=majority          best_of:n=8,reject.every=16,reject.keep=0.5          particles:n=8,every=4

The fields are those of `guidance.search`; the server says which values they accept.
"""

import json
from typing import Any

from qsharp_core.wire.search import KINDS


def search_of(text: str) -> dict[str, Any]:
    """The request's field `guidance.search`.

    Raises:
        ValueError: the text is no search.
    """
    kind, _, fields = text.partition(":")
    if kind not in KINDS:
        raise ValueError(f"a search is KIND:FIELD=VALUE,… with one of the kinds {', '.join(KINDS)}; got {text!r}")
    search: dict[str, Any] = {"kind": kind}
    for part in filter(None, fields.split(",")):
        path, equals, value = part.partition("=")
        *outer, name = path.strip().split(".")
        if not equals or not name:
            raise ValueError(f"a field of a search is FIELD=VALUE; got {part!r} in {text!r}")
        inside = search
        for one in outer:
            inside = inside.setdefault(one, {})
            if not isinstance(inside, dict):
                raise ValueError(f"{one} has a value and fields in {text!r}")
        inside[name] = _value(value.strip())
    return search


def search_named(text: str) -> str | None:
    """The same text; None for `none`, which is without a search.

    Raises:
        ValueError: it is no search.
    """
    if text == "none":
        return None
    search_of(text)
    return text


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
