"""The soak, for seconds instead of half an hour; and what it would notice."""

import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.soak.footprint import Footprint
from benchmarks.soak.ledger import REQUEST, Ledger
from tests.server.test_store import made


@pytest.mark.timeout(300)
def test_a_short_soak_leaves_nothing_behind() -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "0.3", "--clients", "12"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "all as it must be" in done.stdout


def test_what_is_stored_is_what_was_told() -> None:
    told, quiet, left = (made(metadata={REQUEST: name}) for name in "abc")
    ledger = Ledger()
    ledger.note(told.id, list(told.completion_token_ids))
    ledger.given_up.add("c")
    assert ledger.faults([told, left]) == []
    assert ledger.faults([left]) == [f"{told.id} is not stored"]
    assert ledger.faults([told, told]) == [f"{told.id} is stored twice"]
    assert ledger.faults([told, quiet]) == [f"{quiet.id} is stored, and nobody was told"]
    assert ledger.faults([replace(told, completion_token_ids=[1])]) == [f"{told.id} is stored with other tokens"]
    ledger.rewarded[told.id] = 1.0
    assert ledger.faults([told]) == [f"{told.id} has the reward None, and was given 1.0"]


@pytest.mark.parametrize(("memory", "grown"), [([2**30] * 100, False), ([2**30 + i * 2**20 for i in range(100)], True)])
def test_growth_of_memory(memory: list[float], grown: bool) -> None:
    footprint = Footprint()
    footprint.memory, footprint.threads, footprint.descriptors = (
        memory,
        [50.0] * 100,
        [90.0 + i % 7 for i in range(100)],
    )
    assert [growth.grown for growth in footprint.growth()] == [grown, False, False]


@pytest.mark.parametrize("what", ["threads", "descriptors"])
def test_growth_of_what_is_counted(what: str) -> None:
    footprint = Footprint()
    footprint.memory = footprint.threads = footprint.descriptors = [100.0] * 100
    setattr(footprint, what, [100.0 + i // 5 for i in range(100)])
    assert [growth.what for growth in footprint.growth() if growth.grown] == [what]
