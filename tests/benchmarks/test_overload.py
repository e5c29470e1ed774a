"""What the open loop counts as served."""

import json
from typing import Any

import httpx
import pytest

from benchmarks.overload import TOKENS, Answers, tokens_of

GOOD = {"index": 0, "guidance": {"eta": 0.2, "tokens_total": TOKENS}}


def whole(*choices: dict[str, Any], status: int = 200) -> httpx.Response:
    return httpx.Response(status, json={"choices": list(choices)})


@pytest.mark.parametrize(
    ("answer", "eta", "n", "tokens"),
    [
        (whole(GOOD), 0.2, 1, TOKENS),
        (whole(GOOD, GOOD), 0.2, 2, 2 * TOKENS),
        (whole(GOOD), 0.2, 2, 0),  # one is missing
        (whole(GOOD), None, 1, 0),  # guided unasked
        (whole({"index": 0, "guidance": {"eta": None, "tokens_total": TOKENS}}), 0.2, 1, 0),  # unguided though asked
        (whole(GOOD, status=500), 0.2, 1, 0),
        (whole({"index": 0}), 0.2, 1, 0),
    ],
)
def test_tokens_of_a_whole_answer(answer: httpx.Response, eta: float | None, n: int, tokens: int) -> None:
    body = {"n": n, "stream": False, **({} if eta is None else {"eta": eta})}
    assert tokens_of(answer, body) == tokens


def test_tokens_of_a_stream() -> None:
    lines = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in ({"index": 0}, GOOD)]
    answer = httpx.Response(200, text="".join(lines) + "data: [DONE]\n\n")
    assert tokens_of(answer, {"n": 1, "stream": True, "eta": 0.2}) == TOKENS
    cut = httpx.Response(200, text=lines[0] + 'data: {"error": {"code": 500}}\n\n')
    assert tokens_of(cut, {"n": 1, "stream": True, "eta": 0.2}) == 0


def test_goodput_is_of_what_ended_in_time() -> None:
    answers = Answers(ended=[0.5, 1.5, 2.5], took=[0.5, 1.0, 2.0], tokens=[10, 20, 40])
    assert answers.goodput(0, 2) == 15
    assert answers.goodput(2, 3) == 40
    assert answers.slowest(0, 3) == pytest.approx(1.98)
