"""Text and JSON that every database and every Parquet reader takes."""

import json
from collections.abc import Mapping
from typing import Any

DEEPEST = 100  # lists and objects within each other: readers and writers of JSON give up at some depth


def to_json(value: Any) -> str:
    """JSON as the store and Parquet files have it: compact, and with `clean` texts.

    Raises:
        ValueError: the value has NaN or an infinity, which JSON does not have.
    """
    text = _dumps(value)
    if "\\u0000" in text or not is_encodable(text):
        text = _dumps(cleaned(value))
    return text


def clean(text: str) -> str:
    """The text with U+FFFD in place of NUL and unpaired surrogates, which databases refuse."""
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    return text if is_encodable(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cleaned(value: Any) -> Any:
    """JSON's data with `clean` texts and names."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {clean(name): cleaned(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(inner) for inner in value]
    return value


def is_deeper(value: Any, most: int) -> bool:
    """Whether more than `most` lists and objects are within each other in JSON's data; the outermost counts, too."""
    level = [value]
    for _ in range(most + 1):
        level = [one for one in level if isinstance(one, Mapping | list | tuple)]
        if not level:
            return False
        level = [inner for one in level for inner in (one.values() if isinstance(one, Mapping) else one)]
    return True


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def is_encodable(text: str) -> bool:
    """Whether the text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
