"""Text and JSON that every database and every Parquet reader takes."""

import json
from collections.abc import Mapping
from typing import Any


def to_json(value: Any) -> str:
    """JSON as the store and Parquet files have it: compact, and with `clean` texts.

    Raises:
        ValueError: the value has NaN or an infinity, which JSON does not have.
    """
    text = _dumps(value)
    if "\\u0000" in text or not _encodable(text):
        text = _dumps(_clean_all(value))
    return text


def clean(text: str) -> str:
    """The text with U+FFFD in place of NUL and unpaired surrogates, which databases refuse."""
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    return text if _encodable(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _clean_all(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {clean(name): _clean_all(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean_all(inner) for inner in value]
    return value
