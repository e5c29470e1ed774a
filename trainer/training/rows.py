"""When sequences run as padded rows rather than as trees, and which rows run in one pass."""

from collections.abc import Mapping, Sequence

MAX_PADDING = 0.09
# Trees pay only if they run at most this fraction of the rows' tokens: a tree's attention is dense over its nodes.
WORTHWHILE = 0.8


def padded_passes(indices: Sequence[int], lengths: Mapping[int, int], max_tokens: int) -> list[list[int]]:
    """Cuts sequences into passes of at most `max_tokens` padded tokens (or one row) and `MAX_PADDING`."""
    passes: list[list[int]] = []
    widest = tokens = 0
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        if passes:
            area = widest * (len(passes[-1]) + 1)
            if area <= max_tokens and area - tokens - lengths[i] <= MAX_PADDING * area:
                passes[-1].append(i)
                tokens += lengths[i]
                continue
        passes.append([i])
        widest = tokens = lengths[i]
    return passes
