"""What clients were told is stored, and what the store has."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx

from qsharp_core.rollouts import parquet
from qsharp_core.rollouts.records import Rollout

REQUEST = "request"  # metadata that names the request


class Ledger:
    """Notes of the clients, for the comparison at the end.

    Attributes:
        told: a hash of the tokens of each rollout that a client was told of, by its id.
        given_up: requests whose client went away, so that some of their rollouts may be stored all the same.
        rewarded: rewards that were given, by rollout.
    """

    def __init__(self) -> None:
        self.told: dict[str, int] = {}
        self.given_up: set[str] = set()
        self.rewarded: dict[str, float] = {}

    def note(self, rollout: str, tokens: list[int]) -> None:
        """A client was told that this is stored."""
        self.told[rollout] = hash(tuple(tokens))

    def faults(self, stored: Iterable[Rollout]) -> list[str]:
        """What the store lacks, has too much, or has otherwise.

        Args:
            stored: all stored rollouts.
        """
        found, missing = [], dict(self.told)
        for rollout in stored:
            if rollout.id in self.told:
                if missing.pop(rollout.id, None) is None:
                    found.append(f"{rollout.id} is stored twice")
                if hash(tuple(rollout.completion_token_ids)) != self.told[rollout.id]:
                    found.append(f"{rollout.id} is stored with other tokens")
                given = self.rewarded.get(rollout.id)
                if rollout.reward != given:
                    found.append(f"{rollout.id} has the reward {rollout.reward}, and was given {given}")
            elif rollout.metadata[REQUEST] not in self.given_up:
                found.append(f"{rollout.id} is stored, and nobody was told")
        return found + [f"{name} is not stored" for name in missing]


def stored(http: httpx.Client) -> Iterator[Rollout]:
    """All rollouts of a server's store."""
    with tempfile.TemporaryDirectory(prefix="qsharp-") as folder:
        path = Path(folder) / "rollouts.parquet"
        with path.open("wb") as file, http.stream("GET", "/v1/rollouts/export") as answer:
            answer.raise_for_status()
            for chunk in answer.iter_bytes():
                file.write(chunk)
        for batch in parquet.read(path):
            yield from batch
