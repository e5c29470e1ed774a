"""Features on disk: for every known prefix and next token the reference's hidden state and the token's log-probability.

    FOLDER/<reference>/<name>.hidden         `[R, D]` bfloat16, raw: memory-mapped, read a row at a time
    FOLDER/<reference>/<name>.safetensors    `keys` [E, 16], `rows` [E], `log_ref` [E]: entries, and each's hidden state

A shard is written once, whole or not at all, and never changed, so runs may read and add at the same time. What nobody
has read for the longest goes first when the folder would grow beyond its bound; a shard that a run has open stays
readable to its end.
"""

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from qsharp_core.disk import fsync
from trainer.training.settings import TrainingError

HIDDEN, ENTRIES = ".hidden", ".safetensors"
BYTES = 2  # of a bfloat16
Keys = NDArray[np.void]


def as_keys(keys_NK: NDArray[np.uint8]) -> Keys:
    """Digests as values that numpy sorts and compares: `[N, KEY]` bytes to `[N]`."""
    return np.ascontiguousarray(keys_NK).view(f"V{keys_NK.shape[1]}")[:, 0]


@dataclass(frozen=True, eq=False)
class Shard:
    """Entries that were computed together: E of them, R hidden states.

    Attributes:
        keys_E: digests of a prefix with its next token, ascending.
        rows_E: each's hidden state.
        log_ref_E: float32.
        hidden_RD: bfloat16, memory-mapped.
    """

    path: Path
    keys_E: Keys
    rows_E: Tensor
    log_ref_E: Tensor
    hidden_RD: Tensor


class FeatureStore:
    """The shards of one reference.

    Args:
        folder: of all references' features.
        reference: digest of what the features hang on beside the tokens.
        width: of a hidden state.
        limit: bytes that `folder` may hold.
    """

    def __init__(self, folder: Path, reference: str, width: int, limit: int) -> None:
        self._all = folder
        self._folder = folder / reference
        self._width = width
        self._limit = limit
        self._folder.mkdir(parents=True, exist_ok=True)
        self.shards = [self._open(path.with_suffix("")) for path in sorted(self._folder.glob(f"[!.]*{ENTRIES}"))]

    def find(self, keys_N: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where entries are: each's shard, -1 where it is in none, and its place there."""
        shard_N = np.full(len(keys_N), -1)
        place_N = np.zeros(len(keys_N), dtype=np.int64)
        for number, shard in enumerate(self.shards):
            place = np.searchsorted(shard.keys_E, keys_N).clip(max=len(shard.keys_E) - 1)
            found = (shard.keys_E[place] == keys_N) & (shard_N < 0)
            shard_N[found], place_N[found] = number, place[found]
        return shard_N, place_N

    def make_room(self, rows: int, entries: int) -> None:
        """Removes what was not read for the longest, so that so much more fits.

        Raises:
            TrainingError: it would not fit even so.
        """
        wanted = rows * self._width * BYTES + entries * 32
        ours = {shard.path.name for shard in self.shards}
        shards = sorted(self._all.glob(f"*/[!.]*{HIDDEN}"), key=lambda path: path.stat().st_mtime)
        sizes = {path: _size(path) + _size(path.with_suffix(ENTRIES)) for path in shards}
        held = sum(sizes.values())
        for path in shards:
            if held + wanted <= self._limit:
                return
            if path.parent == self._folder and path.stem in ours:
                continue
            held -= sizes[path]
            path.with_suffix(ENTRIES).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        if held + wanted > self._limit:
            raise TrainingError(
                f"the rollouts' features take {(held + wanted) / 1e9:.1f} GB in {self._all}, and --features-gb allows "
                f"{self._limit / 1e9:.1f}: raise it, or train on fewer rollouts"
            )

    def add(self, keys_E: Keys, rows_E: Tensor, log_ref_E: Tensor, hidden_RD: Tensor) -> None:
        """Writes a shard; entries in any order."""
        order = np.argsort(keys_E)
        path = self._folder / uuid.uuid4().hex
        raw = np.frombuffer(np.ascontiguousarray(keys_E[order]).tobytes(), np.uint8).reshape(len(keys_E), -1)
        index = torch.from_numpy(order)
        entries = {
            "keys": torch.from_numpy(raw.copy()),
            "rows": rows_E[index].int(),
            "log_ref": log_ref_E[index].float(),
        }
        part = path.with_name(f".{path.name}")
        part.with_suffix(HIDDEN).write_bytes(hidden_RD.bfloat16().contiguous().view(torch.int16).numpy().tobytes())
        save_file(entries, part.with_suffix(ENTRIES))
        # The entries last: a shard is there when they are.
        for suffix in (HIDDEN, ENTRIES):
            fsync(part.with_suffix(suffix))
            part.with_suffix(suffix).rename(path.with_suffix(suffix))
        fsync(self._folder)
        self.shards.append(self._open(path))

    def _open(self, path: Path) -> Shard:
        entries = load_file(path.with_suffix(ENTRIES))
        hidden = path.with_suffix(HIDDEN)
        os.utime(hidden)  # read just now
        rows = hidden.stat().st_size // (self._width * BYTES)
        raw = np.memmap(hidden, dtype=np.int16, mode="c", shape=(rows, self._width))
        return Shard(
            path,
            as_keys(entries["keys"].numpy()),
            entries["rows"].long(),
            entries["log_ref"],
            torch.from_numpy(raw).view(torch.bfloat16),
        )


def _size(path: Path) -> int:
    """0 where there is none: a kill may have come between the two files of a shard."""
    return path.stat().st_size if path.exists() else 0
