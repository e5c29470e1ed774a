"""Host-side bookkeeping of the critic's key/value pool: blocks, prefixes, sequences. No tensors, no arithmetic.

The pool is a *cache*: what it holds follows from token ids alone, and anything a running pass does not need may be
dropped and computed again. So no request ever fails for want of room, and preemption, slot moves and rolled-back
tokens need no special case: a sequence is compared with its history at every step.

A full block is known by the digest of all tokens up to its end, so equal prefixes share blocks, also with sequences
that are gone, until their blocks are reused (least recently used first).
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

Digest = bytes


class BlockPool:
    """Blocks of `block_size` token positions, reference-counted.

    Args:
        blocks: how many.
        block_size: tokens a block holds.

    Attributes:
        wanted, found: tokens of histories that began here, and those of them that were there already; whoever counts
            them sets them back.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.wanted = self.found = 0
        self._references = [0] * blocks
        self._digest: list[Digest | None] = [None] * blocks
        self._by_digest: dict[Digest, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))

    @property
    def free(self) -> int:
        """Blocks that no sequence holds; some still carry a prefix that can be shared."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that some sequence holds."""
        return self.blocks - len(self._free)

    def take(self) -> int:
        """A block for new content; forgets the prefix it carried. There must be a free one."""
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def share(self, digest: Digest) -> int | None:
        """The block that holds this prefix, held once more; None where there is none."""
        block = self._by_digest.get(digest)
        if block is not None:
            self._references[block] += 1
            self._free.pop(block, None)
        return block

    def publish(self, block: int, digest: Digest) -> None:
        """Offers a full block for sharing, unless an equal one is offered already."""
        if digest not in self._by_digest:
            self._by_digest[digest] = block
            self._digest[block] = digest

    def published(self, block: int) -> bool:
        """Whether other sequences may share it: its content must not change."""
        return self._digest[block] is not None

    def release(self, block: int) -> None:
        """Gives one hold back."""
        self._references[block] -= 1
        assert self._references[block] >= 0, block
        if self._references[block] == 0:
            self._free[block] = None

    def forget_all(self) -> None:
        """Shares nothing any more: the contents cannot be trusted."""
        self.forget(range(self.blocks))

    def forget(self, blocks: Iterable[int]) -> None:
        """Shares these blocks no more."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        digest = self._digest[block]
        if digest is not None:
            del self._by_digest[digest]
            self._digest[block] = None


@dataclass
class Sequence:
    """What the pool holds of one request.

    Attributes:
        tokens: ids whose keys and values are in the pool (or will be by the end of the running pass).
        blocks: block table; block `i` holds positions `i * block_size …`.
        digests: of the full blocks.
        cuts: how often tokens were taken from its end.
        ahead: positions behind `tokens` that the pool holds too, of tokens only the device knows.
    """

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)
    cuts: int = 0
    ahead: int = 0

    @property
    def length(self) -> int:
        """Positions the pool holds."""
        return len(self.tokens) + self.ahead


def truncate(pool: BlockPool, sequence: Sequence, length: int) -> None:
    """Keeps the first `length` known tokens at most, to a block's edge where the cut block may be shared."""
    if length >= len(sequence.tokens) and not sequence.ahead:
        return
    sequence.cuts += 1
    sequence.ahead = 0
    size = pool.block_size
    length = min(length, len(sequence.tokens))
    whole = length // size
    keep_partial = length % size and not pool.published(sequence.blocks[whole])
    kept = whole + 1 if keep_partial else whole
    for block in sequence.blocks[kept:]:
        pool.release(block)
    del sequence.blocks[kept:]
    del sequence.digests[whole:]
    del sequence.tokens[length if keep_partial else whole * size :]


def adopt(pool: BlockPool, sequence: Sequence, history: list[int], keep: int) -> None:
    """Brings a sequence as far towards `history` as the pool already goes, without computing anything.

    Args:
        history: the request's tokens now.
        keep: use at most this many tokens of the pool (a Q head must run the last one again).
    """
    common = _common_prefix(sequence.tokens, history)
    truncate(pool, sequence, min(common, keep))
    size = pool.block_size
    if not sequence.tokens:
        pool.wanted += keep
    while len(sequence.tokens) % size == 0 and len(sequence.tokens) + size <= keep:
        chunk = history[len(sequence.tokens) : len(sequence.tokens) + size]
        digest = _digest(sequence.digests[-1] if sequence.digests else b"", chunk)
        block = pool.share(digest)
        if block is None:
            return
        pool.found += size
        sequence.blocks.append(block)
        sequence.digests.append(digest)
        sequence.tokens += chunk


def blocks_wanted(pool: BlockPool, sequence: Sequence, length: int) -> int:
    """Blocks to take before `sequence` can hold `length` tokens."""
    return max(0, -(-length // pool.block_size) - len(sequence.blocks))


def extend(pool: BlockPool, sequence: Sequence, tokens: list[int]) -> None:
    """Appends tokens that the running pass computes; there must be blocks. Full blocks are published."""
    size = pool.block_size
    for _ in range(blocks_wanted(pool, sequence, len(sequence.tokens) + len(tokens))):
        sequence.blocks.append(pool.take())
    sequence.tokens += tokens
    while (len(sequence.digests) + 1) * size <= len(sequence.tokens):
        done = len(sequence.digests)
        digest = _digest(sequence.digests[-1] if done else b"", sequence.tokens[done * size : (done + 1) * size])
        sequence.digests.append(digest)
        pool.publish(sequence.blocks[done], digest)


def advance(pool: BlockPool, sequence: Sequence) -> None:
    """Appends a token that only the device knows, and which therefore is not shared; there must be a block."""
    for _ in range(blocks_wanted(pool, sequence, sequence.length + 1)):
        sequence.blocks.append(pool.take())
    sequence.ahead += 1


def _common_prefix(ours: list[int], theirs: list[int]) -> int:
    if ours == theirs[: len(ours)]:  # the usual case, at the speed of C
        return len(ours)
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))


def _digest(parent: Digest, tokens: list[int]) -> Digest:
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()
