"""Numbers that are kept on disk, because there are too many for memory: written in order, read a stretch at a time.

They are in a file without a name, which is gone when nothing has it open any more, after a kill, too.
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.training.settings import TrainingError

Number = TypeVar("Number", bound=np.generic)


class Spill(Generic[Number]):
    """Numbers of one kind on disk.

    Args:
        dtype: of the numbers.
        folder: on whose disk they are; None is the system's folder for temporary files, which may be in memory.

    Attributes:
        size: how many there are.
    """

    def __init__(self, dtype: type[Number], folder: Path | None = None) -> None:
        self._folder = folder
        self._dtype = np.dtype(dtype)
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 – it lives as long as this
        weakref.finalize(self, self._file.close)
        self._written = 0  # what can be read; the rest is in the file object's buffer
        self.size = 0

    def add(self, values: NDArray[Any] | Sequence[Any]) -> int:
        """Puts numbers behind those that are there; returns the place of the first.

        Raises:
            TrainingError: the disk is full.
        """
        place = self.size
        raw = np.ascontiguousarray(values, dtype=self._dtype)
        with self._room():
            self._file.write(raw.data)
        self.size += len(raw)
        return place

    def read(self, place: int, count: int) -> NDArray[Number]:
        """The numbers from a place on.

        Raises:
            TrainingError: the disk is full.
        """
        if self._written < place + count:
            with self._room():
                self._file.flush()
            self._written = self.size
        width = self._dtype.itemsize
        raw = bytearray()
        while missing := count * width - len(raw):
            piece = os.pread(self._file.fileno(), missing, place * width + len(raw))
            assert piece, "what was added is there"
            raw += piece
        return np.frombuffer(raw, self._dtype)

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(f"rollouts cannot be kept in {self._folder or 'a temporary file'}: {error}") from error
