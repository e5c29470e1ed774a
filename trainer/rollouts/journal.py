"""What a command has done, kept so that the same command goes on where it was killed.

A journal is a file of JSON lines. The first line, the header, says what the work is. The others are entries, which are
appended as things are done. Each is handed to the operating system at once, so a killed process loses none. A line that
a kill has cut short is dropped when the file is opened again.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qsharp_core.errors import QSharpError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot() -> str | None:
    """An id of this start of the machine; None if the system does not tell.

    A process that is killed loses nothing of what it has written, but a machine that crashes may. So the end of a
    journal that was written before the last start cannot be trusted.
    """
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else None


class JournalError(QSharpError):
    """The file belongs to other work, or is in use."""


class Journal:
    """An open journal, which no other process can open.

    Args:
        path: the file; it is begun if it is not there.
        header: what the work is; a file with another header is refused.

    Attributes:
        entries: the entries that were there when it was opened.

    Raises:
        JournalError
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise JournalError(f"{path} cannot be opened: {error}") from error
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise JournalError(f"{path} is in use by another process") from error
            self.entries = self._read()
            if not self.entries:
                self.add(header)
            else:
                self._compare(self.entries.pop(0), json.loads(json.dumps(header)))
        except JournalError:
            self._file.close()
            raise

    def add(self, entry: Mapping[str, Any]) -> None:
        """Appends an entry."""
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Closes the journal, with everything on disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
        try:
            return [json.loads(line) for line in data[:whole].split(b"\n")[:-1]]
        except ValueError as error:
            raise JournalError(f"{self.path} is not a journal of this program: {error}") from error

    def _compare(self, begun: Any, header: dict[str, Any]) -> None:
        if not isinstance(begun, dict):
            raise JournalError(f"{self.path} is not a journal of this program")
        differing = [name for name in {**header, **begun} if begun.get(name) != header.get(name)]
        if differing:
            changes = [f"{name} was {begun.get(name)!r:.80}, is {header.get(name)!r:.80}" for name in differing]
            raise JournalError(
                f"{self.path} was begun with other settings: {'; '.join(changes)}. Name another file or folder, or use "
                "those settings"
            )
