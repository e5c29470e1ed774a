"""A vLLM plugin for tests: spoils a running server's critic cache when it is told to, and has a disk that hangs.

As soon as the file that `QSHARP_FAULT` names exists, one slot of the next sequence with a cached prefix is spoilt,
before its row is scored; then the file is removed. Reading a critic's folder that is called `stuck` never ends.
"""

import os
import threading
from pathlib import Path
from typing import Any


def register() -> None:
    """Called by vLLM in each of its processes."""
    if "QSHARP_FAULT" not in os.environ:
        return
    from qsharp_core.critic import checkpoint
    from qsharp_core.critic.scoring.paged import PagedScorer

    told, sound, read = Path(os.environ["QSHARP_FAULT"]), PagedScorer.score, checkpoint.read

    def score(self: Any, sequences: list[Any], *arguments: Any) -> Any:
        if told.exists() and len(sequences[0].tokens) > 8:
            self.wait()
            self.pool.values[0][sequences[0].blocks[0] * self.blocks.block_size + 2] += 1.0
            told.unlink()
        return sound(self, sequences, *arguments)

    def hang(folder: Path, *arguments: Any) -> Any:
        if folder.name == "stuck":
            threading.Event().wait()
        return read(folder, *arguments)

    PagedScorer.score = score  # type: ignore[assignment, method-assign]
    checkpoint.read = hang  # type: ignore[assignment]
