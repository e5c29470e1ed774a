"""Published versions of a critic."""

from dataclasses import dataclass
from pathlib import Path

from qsharp_core.critic.fetching import local_folder
from qsharp_core.errors import QSharpError
from qsharp_core.locations import Location
from trainer.training.publish import is_published


class LoopError(QSharpError):
    """The loop cannot start or go on; the message says what to change."""


@dataclass(frozen=True)
class Version:
    """A published version of a critic; `key` is `name@version`."""

    key: str
    folder: Location

    @classmethod
    def at(cls, folder: Location) -> "Version":
        """The version in a folder `…/<name>/<version>`."""
        return cls(f"{folder.parent.name}@{folder.name}", folder)

    @classmethod
    def of(cls, key: str, out: Location) -> "Version":
        """The version that a key names, in `out/<name>/<version>`.

        Raises:
            LoopError: it is not there any more.
            CriticError: it is in a store that cannot be reached.
        """
        folder = out / Path(*key.rsplit("@", 1))
        if not is_published(folder):
            raise LoopError(
                f"{key} is what this loop goes on with, and {folder} is gone: put it back, or use another --run"
            )
        return cls(key, folder)

    @property
    def on_disk(self) -> Path:
        """Its folder on this machine's disk; fetched if it is in an object store.

        Raises:
            CriticError: it cannot be fetched.
        """
        return local_folder(self.folder)
