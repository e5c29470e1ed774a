"""Which positions are valid, what is no rollout, and how token ids lie in a row."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qsharp_core.errors import RolloutError
from qsharp_core.rollouts.records import first_valid_position, new_id
from qsharp_core.rollouts.text import clean, to_json
from server.store.tables import pack, unpack
from tests.server.test_store import made, unguided


def test_unguided_completions_are_valid_throughout_and_guided_ones_nowhere() -> None:
    assert first_valid_position(guided=False, length=5, cut=None, finish_reason="stop") == 0
    assert first_valid_position(guided=False, length=5, cut=None, finish_reason="length") == 0
    assert first_valid_position(guided=True, length=5, cut=None, finish_reason="stop") is None


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_roll_out_is_valid_from_the_token_at_the_cut(cut: int) -> None:
    """Against the rule itself: the first position such that every token after it was drawn from ref."""
    drawn_from_ref = [position >= cut for position in range(6)]
    rule = next(p for p in range(6) if all(drawn_from_ref[p + 1 :]))
    assert first_valid_position(guided=False, length=6, cut=cut, finish_reason="stop") == rule


@pytest.mark.parametrize("finish_reason", ["abort", "error"])
def test_what_something_else_ended_is_no_rollout_of_ref(finish_reason: str) -> None:
    assert first_valid_position(guided=False, length=5, cut=None, finish_reason=finish_reason) is None
    assert first_valid_position(guided=False, length=5, cut=2, finish_reason=finish_reason) is None


def test_no_tokens_no_position() -> None:
    assert first_valid_position(guided=False, length=0, cut=None, finish_reason="stop") is None


def test_ids_differ() -> None:
    assert len({new_id() for _ in range(1000)}) == 1000
    assert new_id().startswith("rol_")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"id": ""}, "id"),
        ({"id": "a\0"}, "id"),
        ({"route": "responses"}, "route"),
        ({"completion_token_ids": [1, -1]}, "completion_token_ids"),
        ({"prompt_token_ids": [2**31]}, "prompt_token_ids"),
        ({"kl": float("nan")}, "kl"),
        ({"reward": float("inf")}, "reward"),
        ({"cut": 1}, "cut"),
        ({"parent_id": "rol_1"}, "cut"),
        ({"parent_id": "rol_1", "cut": 0}, "cut"),
        ({"parent_id": "rol_1", "cut": 4}, "cut"),
        ({"first_valid_position": 3}, "first_valid_position"),
        ({"first_valid_position": -1}, "first_valid_position"),
        ({"eta": 0.1}, "first_valid_position"),
        ({"parent_id": "rol_1", "cut": 3, "first_valid_position": 1}, "first_valid_position"),
    ],
)
def test_what_is_no_rollout_names_its_field(fields: dict[str, Any], param: str) -> None:
    unguided().check()
    made().check()
    unguided(parent_id="rol_1", cut=3, first_valid_position=2).check()
    with pytest.raises(RolloutError) as raised:
        replace(unguided(), **fields).check()
    assert raised.value.param == param


def test_token_ids_are_little_endian_int32() -> None:
    ids = [0, 1, 258, 2**31 - 1]
    assert pack(ids) == b"\0\0\0\0\1\0\0\0\2\1\0\0\xff\xff\xff\x7f"
    assert unpack(pack(ids)) == ids
    assert unpack(pack([])) == []
    assert pack(np.array(ids)) == pack(ids)  # type: ignore[arg-type]


def test_text_is_cleaned_only_where_it_must_be() -> None:
    good = "é ✓ 𝔸 \u2028\x01"
    assert clean(good) == good
    assert clean("\0\ud800x\udc00") == "\ufffd\ufffdx\ufffd"
    assert to_json({"a": ["\\u0000"]}) == '{"a":["\\\\u0000"]}'
    with pytest.raises(ValueError, match="JSON"):
        to_json(float("nan"))
