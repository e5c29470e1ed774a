"""Where half of a surrogate pair is found, and where none is."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.encodable import half_character

HALF = "a\udc00"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stop": HALF}, "stop"),
        ({"a": "b", "stop": ["x", HALF]}, "stop[1]"),
        ({"messages": [{"content": [{"text": HALF}]}]}, "messages[0].content[0].text"),
        ({"xargs": {HALF: 1}}, "xargs"),
        ({HALF: 1}, "body"),
        (HALF, "body"),
        ([{}, HALF], "[1]"),
        ({"pair": "\U0001f600", "text": "\\ud800"}, None),
        ({"a": 1}, None),
    ],
)
def test_its_field(body: Any, param: str | None) -> None:
    escaped = json.dumps(body)
    assert half_character(escaped.encode()) == param
    assert half_character(escaped.upper().encode() if param is None else escaped.encode("utf-16")) == param
    raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert half_character(raw) == param


@pytest.mark.parametrize("body", [b"", b"{", b"\\ud800", b'"\\ud800', b'"\\ud800"' + b"[" * 100_000])
def test_what_is_no_json_is_left_to_the_route(body: bytes) -> None:
    assert half_character(body) is None


@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_text_that_can_be_encoded_passes(body: Any) -> None:
    assert half_character(json.dumps(body).encode()) is None
