"""The models that benchmarks write are ones that a server takes."""

from pathlib import Path

import torch

from benchmarks.guidance import pairs
from qsharp_core.critic import checkpoint, native_checkpoint


def test_the_tiny_pairs_critics_can_be_loaded(tmp_path: Path) -> None:
    pair = pairs.tiny(tmp_path)
    for folder in pair.critics.values():
        files = checkpoint.read(folder, torch.float32)
        assert checkpoint.build(files, dtype=torch.float32, device=torch.device("cpu"), reference=pair.reference)
    files = checkpoint.read(pair.native, torch.float32)
    assert native_checkpoint.build(files, pair.reference, dtype=torch.float32, device=torch.device("cpu"))
