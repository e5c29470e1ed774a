"""Features on disk: the reference's hidden state after a prefix, and the log-probability of the token that follows.

    FOLDER/<reference>/<name>.hidden         `[R, D]` bfloat16, raw: memory-mapped, read a row at a time
    FOLDER/<reference>/<name>.safetensors    `keys` [E, 16], `rows` [E], `log_ref` [E]: entries, and each's hidden state

A shard is written once, whole or not at all, and never changed, so runs may read and add at the same time. When the
folder would grow beyond its bound, the shards that were not read for the longest are removed. A shard that a run has
open stays readable until the run ends.
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
    """Turns digests, `[N, KEY]` bytes, into values that numpy sorts and compares, `[N]`."""
    return np.ascontiguousarray(keys_NK).view(f"V{keys_NK.shape[1]}")[:, 0]


@dataclass(frozen=True, eq=False)
class Shard:
    """E entries that were computed together, on R hidden states.

    Attributes:
        path: of both files, without their suffixes.
        keys_E: the digest of a prefix with its next token, ascending.
        rows_E: the row of `hidden_RD` that the entry's prefix has.
        log_ref_E: the log-probability of the next token, float32.
        hidden_RD: hidden states, bfloat16, memory-mapped.
    """

    path: Path
    keys_E: Keys
    rows_E: Tensor
    log_ref_E: Tensor
    hidden_RD: Tensor


class FeatureStore:
    """The shards of one reference.

    Args:
        folder: has the features of all references.
        reference: `ReferenceModel.digest`.
        width: of a hidden state.
        limit: the most bytes that `folder` may hold.

    Attributes:
        shards: all that are there.
    """

    def __init__(self, folder: Path, reference: str, width: int, limit: int) -> None:
        self._all = folder
        self._folder = folder / reference
        self._width = width
        self._limit = limit
        self._folder.mkdir(parents=True, exist_ok=True)
        self.shards = [self._open(path.with_suffix("")) for path in sorted(self._folder.glob(f"[!.]*{ENTRIES}"))]

    def find(self, keys_N: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each entry's shard, by index, or -1 if it is in none, and its place in the shard; both `[N]`."""
        shard_N = np.full(len(keys_N), -1)
        place_N = np.zeros(len(keys_N), dtype=np.int64)
        for number, shard in enumerate(self.shards):
            place = np.searchsorted(shard.keys_E, keys_N).clip(max=len(shard.keys_E) - 1)
            here = (shard.keys_E[place] == keys_N) & (shard_N < 0)
            shard_N[here], place_N[here] = number, place[here]
        return shard_N, place_N

    def make_room(self, rows: int, entries: int) -> None:
        """Removes shards that were not read for the longest, so that so many more hidden states and entries fit.

        Raises:
            TrainingError: they do not fit even then.
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
        """Writes a shard; its entries may be in any order."""
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
    """The size of a file; 0 if it is not there, because a kill came between the two files of a shard."""
    return path.stat().st_size if path.exists() else 0
