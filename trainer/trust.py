"""Whose rollouts are learned from, and whose rewards count: whoever writes to the store could steer a critic.

The server knows both by the keys that were used: a rollout's owner, and who gave each reward. The reward that counts is
the last one that a trusted giver gave, whatever others have given since.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Trust:
    """Names of holders of keys; none is everybody.

    Attributes:
        owners: whose rollouts are learned from.
        rewards_by: whose rewards count.
    """

    owners: tuple[str, ...] = ()
    rewards_by: tuple[str, ...] = ()

    @property
    def rollouts(self) -> dict[str, str]:
        """The query of `GET /v1/rollouts` for the rollouts."""
        return {"owner": ",".join(self.owners)} if self.owners else {}

    @property
    def rewards(self) -> dict[str, str]:
        """The query for the rewards: with it, the server shows no others."""
        return {"rewarded_by": ",".join(self.rewards_by)} if self.rewards_by else {}

    def identity(self) -> Mapping[str, Sequence[str]]:
        """What tells a loop that trusts these from others, as JSON's data."""
        named = {"owner": self.owners, "rewards_by": self.rewards_by}
        return {name: list(names) for name, names in named.items() if names}


EVERYBODY = Trust()


def trusted_reward(rewards: Sequence[Mapping[str, Any]] | None, givers: Collection[str]) -> float | None:
    """The last reward of a history that one of these gave; None if they gave none.

    Args:
        rewards: entries with `reward` and `given_by`, oldest first.
        givers: who is trusted.
    """
    of_these = [entry["reward"] for entry in rewards or () if entry.get("given_by") in givers]
    return float(of_these[-1]) if of_these else None
