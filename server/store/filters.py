"""Which rollouts a list or an export has, and in which order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, case, exists, func, literal_column

from qsharp_core.rollouts.records import Rollout
from qsharp_core.rollouts.text import clean
from server.store.tables import rewards, rollouts

Order = Literal["asc", "desc"]  # of commits


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

    def apply(self, query: Select[Any], dialect: str) -> Select[Any]:
        """The query over `rollouts` with these conditions; `dialect` is SQLAlchemy's name of the database."""
        table = rollouts.c
        if self.critic is not None:
            wanted = clean(self.critic)
            query = query.where(
                table.critic == wanted if "@" in wanted else table.critic.startswith(f"{wanted}@", autoescape=True)
            )
        if self.guided is not None:
            query = query.where(table.eta.is_not(None) if self.guided else table.eta.is_(None))
        if self.owners:
            query = query.where(table.owner.in_([clean(name) for name in self.owners]))
        if self._choosy:
            query = query.where(self._judged() if self.has_reward is not False else ~self._judged())
        elif self.has_reward is not None:
            query = query.where(table.reward.is_not(None) if self.has_reward else table.reward.is_(None))
        if self.has_valid_position is not None:
            first = table.first_valid_position
            # A token id takes four bytes (`tables.pack`).
            valid = first.is_not(None) & (4 * first < func.length(table.completion_token_ids))
            query = query.where(valid if self.has_valid_position else ~valid)
        if self.model is not None:
            query = query.where(table.model == clean(self.model))
        for name, value in self.metadata.items():
            # A JSON path would not do: SQLite's cannot quote every key.
            each = func.json_each_text if dialect == "postgresql" else func.json_each
            entry = each(_sound_metadata(dialect)).table_valued("key", "value")
            query = query.where(exists().where(entry.c.key == clean(name), entry.c.value == clean(value)))
        return query

    @property
    def _choosy(self) -> bool:
        """Whether some rewards do not count."""
        return bool(self.rewarded_by) or self.reward_source is not None

    def _judged(self) -> ColumnElement[bool]:
        entry = exists().where(rewards.c.rollout_id == rollouts.c.id)
        if self.rewarded_by:
            entry = entry.where(rewards.c.given_by.in_([clean(name) for name in self.rewarded_by]))
        if self.reward_source is not None:
            entry = entry.where(rewards.c.source == clean(self.reward_source))
        return entry

    def view(self, found: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with the rewards that count."""
        if not self._choosy:
            return list(found)
        source = None if self.reward_source is None else clean(self.reward_source)
        return [one.judged_by(self.rewarded_by or None, source) for one in found]


def _sound_metadata(dialect: str) -> ColumnElement[Any]:
    """A row's metadata, or none if it is no JSON object: otherwise that row would make the whole query fail."""
    column = rollouts.c.metadata
    if dialect == "postgresql":
        return case((func.json_typeof(column) == "object", column), else_=literal_column("'{}'::json"))
    return case((func.json_valid(column), column), else_=literal_column("'{}'"))
