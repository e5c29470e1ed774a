"""Which rollouts a list or an export has, and in which order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, and_, case, cast, exists, func, literal_column, select
from sqlalchemy.dialects.postgresql import JSONB

from qsharp_core.rollouts.records import Rollout
from qsharp_core.rollouts.text import clean
from server.store.tables import rewards, rollouts

Order = Literal["asc", "desc"]  # of commits
_first = rollouts.c.first_valid_position
# A token id takes four bytes (`tables.pack`). The number is a literal, and not a parameter, because databases then see
# that the conditions of `tables`' partial indexes hold.
VALID = and_(_first.is_not(None), literal_column("4") * _first < func.length(rollouts.c.completion_token_ids))
"""A reward labels a position of the rollout."""
TRAINABLE = and_(rollouts.c.reward.is_not(None), VALID)
"""It can be trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Conditions that a rollout must meet, all of them; None and empty are no condition.

    Attributes:
        critic: it was guided by `name@version`, or by any version of `name`.
        guided: a critic guided it throughout, or did not.
        metadata: it has all these entries.
        owners: it belongs to one of these.
        rewarded_by: only rewards given by one of these count. Without `has_reward` this means that it has one.
        reward_source: only rewards of this source count, likewise.
        has_reward: it has a reward, or has none.
        has_valid_position: a reward labels a position of it, so that it can be trained on; or none.
        model: the name of the model that it was sampled from.
        created_after, created_before: it was made at this time or later, and before this time, in seconds since the
            epoch.
        rewarded_after: its first reward that counts has a later place in the order of rewards than this one
            (`RolloutStore.last_reward`).
        trained: it may have trained a version of a critic, or cannot have. It may if it can be trained on, and was made
            before the last such version.
        trained_until: when that version was made, in seconds since the epoch; the store looks after those it knows.
    """

    critic: str | None = None
    guided: bool | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    owners: Sequence[str] = ()
    rewarded_by: Sequence[str] = ()
    reward_source: str | None = None
    has_reward: bool | None = None
    has_valid_position: bool | None = None
    model: str | None = None
    created_after: float | None = None
    created_before: float | None = None
    rewarded_after: int | None = None
    trained: bool | None = None
    trained_until: float = 0.0

    def apply(self, query: Select[Any], dialect: str) -> Select[Any]:
        """The query over `rollouts` with these `conditions`."""
        return query.where(*self.conditions(dialect))

    def conditions(self, dialect: str) -> list[ColumnElement[bool]]:
        """These filters for a row of `rollouts`; `dialect` is SQLAlchemy's name of the database."""
        table = rollouts.c
        found: list[ColumnElement[bool]] = []
        if self.critic is not None:
            found.append(_guided_by(clean(self.critic), dialect))
        if self.guided is not None:
            found.append(table.eta.is_not(None) if self.guided else table.eta.is_(None))
        if self.owners:
            found.append(table.owner.in_([clean(name) for name in self.owners]))
        if self.rewarded_after is not None:
            found += self._first_rewarded(self.rewarded_after)
        if self._choosy and (self.rewarded_after is None or self.has_reward is False):
            judged = exists().where(rewards.c.rollout_id == table.id, *self._counting())
            found.append(judged if self.has_reward is not False else ~judged)
        elif not self._choosy and self.has_reward is not None:
            found.append(table.reward.is_not(None) if self.has_reward else table.reward.is_(None))
        if self.has_valid_position is not None:
            found.append(VALID if self.has_valid_position else ~VALID)
        if self.model is not None:
            found.append(table.model == clean(self.model))
        if self.created_after is not None:
            found.append(table.created >= self.created_after)
        if self.created_before is not None:
            found.append(table.created < self.created_before)
        if self.trained is not None:
            found += self._trained(self.trained)
        found += [_has_entry(clean(name), clean(value), dialect) for name, value in self.metadata.items()]
        return found

    @property
    def _choosy(self) -> bool:
        """Whether some rewards do not count."""
        return bool(self.rewarded_by) or self.reward_source is not None

    def _counting(self) -> list[ColumnElement[bool]]:
        """Conditions on a row of `rewards`: it counts."""
        found: list[ColumnElement[bool]] = []
        if self.rewarded_by:
            found.append(rewards.c.given_by.in_([clean(name) for name in self.rewarded_by]))
        if self.reward_source is not None:
            found.append(rewards.c.source == clean(self.reward_source))
        return found

    def _first_rewarded(self, place: int) -> list[ColumnElement[bool]]:
        # A list of ids, and no EXISTS: SQLite would look for the rewards of every rollout.
        later = select(rewards.c.rollout_id).where(rewards.c.seq > place, *self._counting())
        earlier = exists().where(rewards.c.rollout_id == rollouts.c.id, rewards.c.seq <= place, *self._counting())
        return [rollouts.c.id.in_(later), ~earlier]

    def _trained(self, has: bool) -> list[ColumnElement[bool]]:
        before = rollouts.c.created < self.trained_until
        if has:
            return [TRAINABLE, before]
        if self.created_before is not None and self.created_before <= self.trained_until:
            return [~TRAINABLE]  # the same then, and there is an index for it
        return [~and_(TRAINABLE, before)]

    def view(self, found: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with the rewards that count."""
        if not self._choosy:
            return list(found)
        source = None if self.reward_source is None else clean(self.reward_source)
        return [one.judged_by(self.rewarded_by or None, source) for one in found]


def _guided_by(wanted: str, dialect: str) -> ColumnElement[bool]:
    critic = rollouts.c.critic
    if "@" in wanted:
        return critic == wanted
    if dialect == "postgresql":
        return critic.startswith(f"{wanted}@", autoescape=True)
    # SQLite's LIKE takes small letters for large ones, and uses no index. After "@" comes "A".
    return and_(critic >= f"{wanted}@", critic < f"{wanted}A")


def _has_entry(name: str, value: str, dialect: str) -> ColumnElement[bool]:
    column = rollouts.c.metadata
    if dialect == "postgresql":
        return cast(column, JSONB).contains({name: value})
    # A JSON path would not do: SQLite's cannot quote every key. A row whose metadata are no JSON has none: otherwise it
    # would make the whole query fail.
    sound = case((func.json_valid(column), column), else_=literal_column("'{}'"))
    entry = func.json_each(sound).table_valued("key", "value")
    return exists().where(entry.c.key == name, entry.c.value == value)
