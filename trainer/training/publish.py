"""Published versions of critics: `OUT/<name>/<version>/`, there whole or not at all.

This is how it is on a disk, where a folder is renamed; `remote_versions` has how it is in an object store.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qsharp_core.critic.checkpoint import CriticCard, read_card
from qsharp_core.critic.folder import CARD
from qsharp_core.locations import Location, RemoteFolder
from trainer.training.remote_versions import is_remotely_published, publish_remotely, remote_versions

CardFields = dict[str, Any]
"""Fields of a `critic.json`."""
WORKING = Path("critics")


def working_folder(out: Location) -> Path:
    """Where runs and features are kept unless it is said: beside the versions, or here if those are in a store."""
    return out if isinstance(out, Path) else WORKING


def is_published(folder: Location) -> bool:
    """Whether a version's folder is there.

    Raises:
        CriticError: it is in a store that cannot be reached.
    """
    return is_remotely_published(folder) if isinstance(folder, RemoteFolder) else (folder / CARD).is_file()


def versions(out: Location, name: str) -> list[int]:
    """The numbers of the versions that are published under a name, ascending.

    Raises:
        CriticError: they are in a store that cannot be reached.
    """
    if isinstance(out, RemoteFolder):
        return remote_versions(out, name)
    return sorted(
        int(p.name) for p in (out / name).glob("*") if p.name.isascii() and p.name.isdecimal() and (p / CARD).is_file()
    )


def latest(out: Location, name: str) -> Location | None:
    """The folder of the last version of a name; None if there is none.

    Raises:
        CriticError: versions are in a store that cannot be reached.
    """
    numbers = versions(out, name)
    return out / name / str(numbers[-1]) if numbers else None


def publish(
    out: Location, fields: CardFields, save: Callable[[Path, CriticCard], None], run_id: str, working: Path
) -> Location:
    """Writes the next version. If the run has published one already, that version is returned.

    A run that was killed between publishing and noting that it has published comes here twice.

    Args:
        out: versions are `out/<name>/<version>`.
        fields: of the card, without its version.
        save: writes the critic's folder.
        run_id: the run's id, which is kept in the card.
        working: folder on this machine's disk, for what is uploaded into a store.

    Returns:
        The version's folder.

    Raises:
        CriticError: `out` is in a store that refuses, or cannot be reached.
    """
    if isinstance(out, RemoteFolder):
        return publish_remotely(out, fields, save, run_id, working)
    name = fields["name"]
    for version in reversed(versions(out, name)):
        folder = out / name / str(version)
        if getattr(read_card(folder), "run", None) == run_id:
            return folder
    while True:
        version = next_version(out, name)
        folder = out / name / str(version)
        card = CriticCard.model_validate(fields | {"version": str(version), "run": run_id})
        try:
            save(folder, card)
        except OSError:
            # Another run took the number between the look and the rename.
            if not folder.exists():
                raise
            continue
        return folder


def next_version(out: Location, name: str) -> int:
    """The number of the next version, if nobody else publishes before."""
    return (versions(out, name) or [0])[-1] + 1
