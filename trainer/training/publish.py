"""The next version of a critic on disk: `FOLDER/<name>/<version>/`, there whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qsharp_core.critic.checkpoint import CARD, CriticCard, read_card


def versions(out: Path, name: str) -> list[int]:
    """Versions that are published under a name, ascending."""
    return sorted(
        int(p.name) for p in (out / name).glob("*") if p.name.isascii() and p.name.isdecimal() and (p / CARD).is_file()
    )


def latest(out: Path, name: str) -> Path | None:
    """The folder of a name's last version."""
    found = versions(out, name)
    return out / name / str(found[-1]) if found else None


def publish(out: Path, fields: dict[str, Any], save: Callable[[Path, CriticCard], None], run_id: str) -> Path:
    """Writes the next version; a run that published already, and was killed before it noted so, gets that one again.

    Args:
        fields: of the card, without its version.
        save: writes the critic's folder.
        run_id: kept in the card.

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
    """The integer after the last version."""
    return (versions(out, name) or [0])[-1] + 1
