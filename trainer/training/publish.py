"""Published versions of critics on disk: `FOLDER/<name>/<version>/`, there whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qsharp_core.critic.checkpoint import CARD, CriticCard, read_card

CardFields = dict[str, Any]
"""Fields of a `critic.json`."""


def versions(out: Path, name: str) -> list[int]:
    """The numbers of the versions that are published under a name, ascending."""
    return sorted(
        int(p.name) for p in (out / name).glob("*") if p.name.isascii() and p.name.isdecimal() and (p / CARD).is_file()
    )


def latest(out: Path, name: str) -> Path | None:
    """The folder of the last version of a name; None if there is none."""
    numbers = versions(out, name)
    return out / name / str(numbers[-1]) if numbers else None


def publish(out: Path, fields: CardFields, save: Callable[[Path, CriticCard], None], run_id: str) -> Path:
    """Writes the next version. If the run has published one already, that version is returned.

    A run that was killed between publishing and noting that it has published comes here twice.

    Args:
        out: versions are `out/<name>/<version>`.
        fields: of the card, without its version.
        save: writes the critic's folder.
        run_id: the run's id, which is kept in the card.

    Returns:
        The version's folder.
    """
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


def next_version(out: Path, name: str) -> int:
    """The number of the next version."""
    return (versions(out, name) or [0])[-1] + 1
