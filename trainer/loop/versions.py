"""Published versions of a critic."""

from dataclasses import dataclass
from pathlib import Path

from qsharp_core.critic.checkpoint import CARD
from qsharp_core.errors import QSharpError


class LoopError(QSharpError):
    """The loop cannot start or go on; the message says what to change."""


@dataclass(frozen=True)
class Version:
    """A published version of a critic; `key` is `name@version`."""

    key: str
    folder: Path

    @classmethod
    def at(cls, folder: Path) -> "Version":
        """The version in a folder `…/<name>/<version>`."""
        return cls(f"{folder.parent.name}@{folder.name}", folder)

    @classmethod
    def of(cls, key: str, out: Path) -> "Version":
        """The version that a key names, in `out/<name>/<version>`.

        Raises:
            LoopError: it is not there any more.
        """
        folder = out / Path(*key.rsplit("@", 1))
        if not (folder / CARD).is_file():
            raise LoopError(
                f"{key} is what this loop goes on with, and {folder} is gone: put it back, or use another --run"
            )
        return cls(key, folder)
