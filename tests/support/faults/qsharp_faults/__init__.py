"""A vLLM plugin for tests: spoils a running server's critic cache when it is told to.

As soon as the file that `QSHARP_FAULT` names exists, one slot of the next sequence with a cached prefix is spoilt,
before its row is scored; then the file is removed.
"""

import os
from pathlib import Path
from typing import Any


def register() -> None:
    """Called by vLLM in each of its processes."""
    if "QSHARP_FAULT" not in os.environ:
        return
    from qsharp_core.critic.scoring.paged import PagedScorer

    told, sound = Path(os.environ["QSHARP_FAULT"]), PagedScorer.score

    def score(self: Any, sequences: list[Any], *arguments: Any) -> Any:
        if told.exists() and len(sequences[0].tokens) > 8:
            self.wait()
            self.pool.values[0][sequences[0].blocks[0] * self.blocks.block_size + 2] += 1.0
            told.unlink()
        return sound(self, sequences, *arguments)

    PagedScorer.score = score  # type: ignore[assignment, method-assign]
