"""Blocks hold what their sequences say, whatever happens to the sequences."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsharp_core.critic.scoring.cache import BlockManager, CachedSequence

SIZE = 4


def write(slots: dict[int, int], sequence: CachedSequence, start: int) -> None:
    """What a pass does: it computes the tokens from `start` on, into the slots of the sequence's blocks."""
    for position in range(start, len(sequence.tokens)):
        slots[sequence.blocks[position // SIZE] * SIZE + position % SIZE] = sequence.tokens[position]


def read(slots: dict[int, int], sequence: CachedSequence) -> list[int]:
    return [slots[sequence.blocks[i // SIZE] * SIZE + i % SIZE] for i in range(len(sequence.tokens))]


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), total=st.sampled_from([6, 12, 40]), keep_last=st.booleans())
def test_blocks_hold_the_tokens_of_their_sequences(seed: int, total: int, keep_last: bool) -> None:
    rng = random.Random(seed)
    manager, slots = BlockManager(total, SIZE), {}
    rows: list[tuple[CachedSequence, list[int]]] = []
    for _ in range(120):
        action = rng.choice(["open", "close", "step", "step", "step", "roll back", "forget"])
        if action == "open" and len(rows) < 6:
            prompt = rng.choice([history for _, history in rows] + [[]])
            rows.append((manager.open(), [*prompt, rng.randrange(3)]))
        elif action == "close" and rows:
            manager.close(rows.pop(rng.randrange(len(rows)))[0])
        elif action == "roll back" and rows:
            history = rng.choice(rows)[1]
            del history[max(1, len(history) - rng.randrange(1, 6)) :]
        elif action == "forget" and rows:
            spoilt = {*rng.choice(rows)[0].blocks}
            manager.forget(spoilt)
            for block in spoilt:
                slots.update({block * SIZE + i: -1 for i in range(SIZE)})
        elif action == "step" and rows:
            sequence, history = rng.choice(rows)
            if len(history) > total * SIZE:
                continue
            manager.touch(sequence)
            manager.adopt(sequence, history, len(history) - keep_last)
            assert manager.make_room(sequence, len(history), {sequence})
            start = len(sequence.tokens)
            manager.extend(sequence, history[start:])
            write(slots, sequence, start)
            assert sequence.tokens == history
            history += [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
        for sequence, _ in rows:
            assert read(slots, sequence) == sequence.tokens
            assert len(sequence.blocks) == -(-len(sequence.tokens) // SIZE)
        assert manager.used == len({block for sequence, _ in rows for block in sequence.blocks})
    for sequence, _ in rows:
        manager.close(sequence)
    assert manager.free == total


def test_blocks_are_taken_from_the_least_recently_used_that_are_not_protected() -> None:
    manager = BlockManager(3, SIZE)
    first, second, third = (manager.open() for _ in range(3))
    for token, sequence in enumerate((first, second, third)):
        manager.extend(sequence, [token] * SIZE)
    manager.touch(first)
    late = manager.open()
    assert not manager.has_room(late, 1)
    assert manager.make_room(late, 1, {second})
    assert [sequence.length for sequence in (first, second, third)] == [SIZE, SIZE, 0]
    assert not manager.make_room(late, 2 * SIZE, {first, second})


def test_counts_are_of_new_histories_and_begin_again_when_taken() -> None:
    manager = BlockManager(10, SIZE)
    history = list(range(10))
    first, second = manager.open(), manager.open()
    for sequence in (first, second):
        manager.adopt(sequence, history, len(history))
        manager.extend(sequence, history[len(sequence.tokens) :])
    assert manager.take_counts() == (20, 8)
    manager.adopt(second, [*history, 10], 11)
    assert manager.take_counts() == (0, 0)


@pytest.mark.parametrize(("ahead", "blocks"), [(1, 1), (2, 1), (3, 2)])
def test_tokens_that_only_the_device_knows_take_blocks_and_are_not_shared(ahead: int, blocks: int) -> None:
    manager = BlockManager(4, SIZE)
    sequence, other = manager.open(), manager.open()
    manager.extend(sequence, [7, 8])
    for _ in range(ahead):
        manager.advance(sequence)
    assert (sequence.length, len(sequence.blocks)) == (2 + ahead, blocks)
    manager.adopt(other, [7, 8, 9, 9], 4)
    assert other.length == 0
    manager.truncate(sequence, 2)
    assert (sequence.length, sequence.cuts) == (2, 1)
