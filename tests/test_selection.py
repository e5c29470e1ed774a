"""Candidates, chosen on one core or two."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsharp_core import policy
from qsharp_core.policy import Candidates
from qsharp_core.vllm_plugin import selection
from qsharp_core.vllm_plugin.selection import CandidateSelector


@pytest.fixture(scope="module")
def beside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


@given(
    rows=st.integers(1, 9),
    vocab=st.integers(2, 900),
    most=st.integers(1, 40),
    warm=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_two_cores_choose_what_one_does(
    beside: ThreadPoolExecutor, rows: int, vocab: int, most: int, warm: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "LEAST_LOGITS", 1000)
        logits = 5 * torch.randn(rows, vocab, generator=generator)
        temperatures = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5 if warm else None
        counts = torch.randint(0, most + 1, (rows,), generator=generator).tolist()
        least = policy.least_log_ref(counts, [0.01] * rows, most)
        wanted = policy.select_candidates(logits, temperatures, least)
        found = CandidateSelector(beside).select(logits, temperatures, least)
    for name, value in vars(wanted).items():
        assert torch.equal(getattr(found, name), value), name


def test_half_of_the_rows_are_chosen_on_the_other_core(
    beside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "LEAST_LOGITS", 100)
    sizes: list[int] = []
    submit = beside.submit

    def spied(part: Callable[[int, int], Candidates], start: int, end: int) -> Future[Candidates]:
        sizes.append(end - start)
        return submit(part, start, end)

    monkeypatch.setattr(beside, "submit", spied)
    least = policy.least_log_ref([5] * 7, [0.0] * 7, 5)
    CandidateSelector(beside).select(torch.randn(7, 50), None, least)
    assert sizes == [4]
    CandidateSelector(beside).select(torch.randn(1, 500), None, least[:1])  # a single row is not divided
    CandidateSelector(beside).select(torch.randn(7, 14), None, least)  # and it is not worth it
    assert sizes == [4]
