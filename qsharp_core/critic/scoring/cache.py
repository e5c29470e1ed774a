"""Bookkeeping, on the host, of a critic's cache of keys and values: blocks, shared prefixes, sequences. No tensors.

What the cache holds follows from token ids alone, so anything that the running pass does not need may be dropped and
computed again. No request ever fails for want of room. Preemption, moves between slots and rolled-back tokens need no
special case, because a sequence is compared with its request's history at every step.

A full block is identified by the digest of all tokens up to its end. Sequences with equal prefixes therefore share
blocks. A block that no sequence holds keeps its prefix until it is reused, least recently used first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

Digest = bytes


class PrefixCounts(NamedTuple):
    """How much of new histories the cache already held.

    Attributes:
        tokens: tokens of histories whose sequences were empty.
        hits: those of them whose keys and values were found in shared blocks.
    """

    tokens: int
    hits: int


@dataclass(eq=False)
class CachedSequence:
    """What the cache holds of one request. Only the `BlockManager` that opened it changes it.

    Attributes:
        tokens: ids whose keys and values are in the cache, or will be by the end of the running pass.
        blocks: block table; entry `i` holds positions `i · block_size …`.
        digests: digest of each full block.
        cuts: how many times tokens were removed from the end.
        ahead: number of positions behind `tokens` that the cache holds too, of tokens that only the device knows.
    """

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)
    cuts: int = 0
    ahead: int = 0

    @property
    def length(self) -> int:
        """Number of positions in the cache."""
        return len(self.tokens) + self.ahead


class BlockManager:
    """Reference-counted blocks of token positions, and the sequences that hold them.

    Args:
        total: number of blocks.
        block_size: token positions per block.
    """

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self._new_tokens = self._hits = 0
        self._open: OrderedDict[CachedSequence, None] = OrderedDict()  # least recently used first
        self._references = [0] * total
        self._digest: list[Digest | None] = [None] * total
        self._by_digest: dict[Digest, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))

    @property
    def free(self) -> int:
        """Number of blocks that no sequence holds; some still carry a prefix that can be shared."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Number of blocks that some sequence holds."""
        return self.total - len(self._free)

    def take_counts(self) -> PrefixCounts:
        """What was counted since the last call."""
        counts = PrefixCounts(self._new_tokens, self._hits)
        self._new_tokens = self._hits = 0
        return counts

    # -- sequences

    def open(self) -> CachedSequence:
        """An empty sequence."""
        sequence = CachedSequence()
        self._open[sequence] = None
        return sequence

    def close(self, sequence: CachedSequence) -> None:
        """Gives the blocks of a sequence back. Its prefixes stay shareable until the blocks are reused."""
        self.truncate(sequence, 0)
        del self._open[sequence]

    def touch(self, sequence: CachedSequence) -> None:
        """Makes a sequence the most recently used one."""
        self._open.move_to_end(sequence)

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Keeps at most the first `length` known tokens.

        A block that is cut in the middle is dropped as a whole where other sequences may share it.
        """
        if length >= len(sequence.tokens) and not sequence.ahead:
            return
        sequence.cuts += 1
        sequence.ahead = 0
        size = self.block_size
        length = min(length, len(sequence.tokens))
        whole = length // size
        keep_partial = length % size and not self._is_published(sequence.blocks[whole])
        kept = whole + 1 if keep_partial else whole
        for block in sequence.blocks[kept:]:
            self._release(block)
        del sequence.blocks[kept:]
        del sequence.digests[whole:]
        del sequence.tokens[length if keep_partial else whole * size :]

    def adopt(self, sequence: CachedSequence, history: list[int], keep: int) -> None:
        """Makes a sequence a prefix of `history`, as long as the cache already allows. Computes nothing.

        Args:
            sequence: loses the tokens that differ from `history`, and gets blocks that others computed.
            history: the tokens of the request now.
            keep: use at most this many cached tokens (a Q head must run the last token again).
        """
        common = _common_prefix(sequence.tokens, history)
        self.truncate(sequence, min(common, keep))
        size = self.block_size
        if not sequence.tokens:
            self._new_tokens += keep
        while len(sequence.tokens) % size == 0 and len(sequence.tokens) + size <= keep:
            chunk = history[len(sequence.tokens) : len(sequence.tokens) + size]
            digest = _digest(sequence.digests[-1] if sequence.digests else b"", chunk)
            block = self._share(digest)
            if block is None:
                return
            self._hits += size
            sequence.blocks.append(block)
            sequence.digests.append(digest)
            sequence.tokens += chunk

    def has_room(self, sequence: CachedSequence, length: int) -> bool:
        """Whether there are free blocks for `sequence` to hold `length` tokens."""
        return self._blocks_missing(sequence, length) <= self.free

    def make_room(self, sequence: CachedSequence, length: int, protected: Collection[CachedSequence]) -> bool:
        """Takes blocks from the least recently used sequences until `sequence` can hold `length` tokens.

        Args:
            sequence: keeps its own blocks.
            length: number of tokens that it is to hold.
            protected: sequences that keep their blocks as well.

        Returns:
            Whether there is room now.
        """
        if self.has_room(sequence, length):
            return True  # the usual case
        victims = (s for s in self._open if s.blocks and s is not sequence and s not in protected)
        while not self.has_room(sequence, length):
            victim = next(victims, None)
            if victim is None:
                return False
            self.truncate(victim, 0)
        return True

    def extend(self, sequence: CachedSequence, tokens: list[int]) -> None:
        """Appends tokens that the running pass computes, and publishes full blocks. There must be room."""
        size = self.block_size
        self._take_blocks(sequence, len(sequence.tokens) + len(tokens))
        sequence.tokens += tokens
        while (len(sequence.digests) + 1) * size <= len(sequence.tokens):
            done = len(sequence.digests)
            digest = _digest(sequence.digests[-1] if done else b"", sequence.tokens[done * size : (done + 1) * size])
            sequence.digests.append(digest)
            self._publish(sequence.blocks[done], digest)

    def advance(self, sequence: CachedSequence) -> None:
        """Appends one token that only the device knows, and that is therefore not shared. There must be room."""
        self._take_blocks(sequence, sequence.length + 1)
        sequence.ahead += 1

    # -- contents that cannot be trusted

    def forget_all(self) -> None:
        """Empties all sequences, which stay open, and shares no block any more."""
        for sequence in self._open:
            self.truncate(sequence, 0)
        self._unpublish(range(self.total))

    def forget(self, blocks: Collection[int]) -> None:
        """Empties every sequence that holds one of these blocks, and shares the blocks no more."""
        for sequence in self._open:
            if not set(blocks).isdisjoint(sequence.blocks):
                self.truncate(sequence, 0)
        self._unpublish(blocks)

    # -- blocks

    def _blocks_missing(self, sequence: CachedSequence, length: int) -> int:
        return max(0, -(-length // self.block_size) - len(sequence.blocks))

    def _take_blocks(self, sequence: CachedSequence, length: int) -> None:
        for _ in range(self._blocks_missing(sequence, length)):
            block, _ = self._free.popitem(last=False)
            self._unpublish([block])
            self._references[block] = 1
            sequence.blocks.append(block)

    def _share(self, digest: Digest) -> int | None:
        """The block that holds this prefix, with one more reference; None if there is none."""
        block = self._by_digest.get(digest)
        if block is not None:
            self._references[block] += 1
            self._free.pop(block, None)
        return block

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        assert self._references[block] >= 0, block
        if self._references[block] == 0:
            self._free[block] = None

    def _publish(self, block: int, digest: Digest) -> None:
        """Offers a full block for sharing, unless an equal one is offered already."""
        if digest not in self._by_digest:
            self._by_digest[digest] = block
            self._digest[block] = digest

    def _is_published(self, block: int) -> bool:
        """Whether other sequences may share the block: then its content must not change."""
        return self._digest[block] is not None

    def _unpublish(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            digest = self._digest[block]
            if digest is not None:
                del self._by_digest[digest]
                self._digest[block] = None


def _common_prefix(ours: list[int], theirs: list[int]) -> int:
    if ours == theirs[: len(ours)]:  # the usual case, at the speed of C
        return len(ours)
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))


def _digest(parent: Digest, tokens: list[int]) -> Digest:
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()
