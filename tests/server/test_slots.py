"""How many samples are on their way: admitted together, refused together, given back whatever happens."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import OverloadedError, response_of
from server.request.slots import Slots, samples_of


@given(limit=st.integers(1, 20), steps=st.lists(st.integers(-5, 12)))
def test_never_more_than_the_limit_but_for_one_alone(limit: int, steps: list[int]) -> None:
    slots, running = Slots(limit), list[tuple[ExitStack, int]]()
    for step in steps:
        if step <= 0:
            if running:
                running.pop(step % len(running))[0].close()
        else:
            stack = ExitStack()
            before = slots.taken
            try:
                stack.enter_context(slots.take(step))
            except OverloadedError:
                assert before > 0
                assert before + step > limit
                assert slots.taken == before
            else:
                running.append((stack, step))
        assert slots.taken == sum(samples for _, samples in running)
        assert slots.taken <= limit or len(running) == 1
    for stack, _ in running:
        stack.close()
    assert slots.taken == 0


def test_an_error_gives_them_back() -> None:
    slots = Slots(3)
    with pytest.raises(ValueError, match="broken"), slots.take(2):
        raise ValueError("broken")
    assert slots.taken == 0


def test_the_answer_says_when_to_come_again() -> None:
    slots = Slots(1)
    with slots.take(1), pytest.raises(OverloadedError) as caught, slots.take(1):
        pass
    response = response_of(caught.value)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("prompt", "n", "samples"),
    [
        ("a", None, 1),
        ("a", 3, 3),
        ([1, 2, 3], 2, 2),
        (["a", "b"], 2, 4),
        ([[1], [2], [3]], 1, 3),
        ([], 2, 2),
        (None, 4, 4),
        ("a", 2**63, 1),  # vLLM refuses it: nobody has to wait for that
        ("a", -3, 1),
    ],
)  # fmt: skip
def test_what_a_request_asks_for(prompt: Any, n: int | None, samples: int) -> None:
    assert samples_of(SimpleNamespace(prompt=prompt, n=n, guidance=None)) == samples


@pytest.mark.parametrize(("n", "searched", "samples"), [(1, 8, 8), (3, 8, 8), (9, 8, 9), (None, None, 1), (2, None, 2)])
def test_a_search_takes_as_many_as_it_samples(n: int | None, searched: int | None, samples: int) -> None:
    guidance = SimpleNamespace(samples=searched)
    assert samples_of(SimpleNamespace(prompt="a", n=n, guidance=guidance)) == samples
    assert samples_of(SimpleNamespace(prompt=["a", "b"], n=n, guidance=guidance)) == 2 * samples
