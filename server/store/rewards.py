"""Rewards: what is given, what became of it, and how the writer stores it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, bindparam, insert, select, update

from qsharp_core.rollouts.records import Reward
from qsharp_core.rollouts.text import clean
from qsharp_core.wire.guidance import BUDGETS, Method
from server.store.tables import rewards, rollouts

IN = 1000  # ids in one IN (…)
Key = TypeVar("Key", str, int)


class GivenReward(NamedTuple):
    """A reward that is given to the rollout `id`; `source` says who judged."""

    id: str
    reward: float
    source: str | None = None


class Giving(NamedTuple):
    """Rewards that are given together, all or none.

    Attributes:
        owner: only rollouts of this owner get rewards; None: of any.
        given_by: the holder of the key that they are given with.
        created: when, in seconds since the epoch.
    """

    items: Sequence[GivenReward]
    owner: str | None
    given_by: str
    created: float


class Prediction(NamedTuple):
    """What was reported of a guided rollout when it was sampled.

    Attributes:
        critic: `name@version`.
        value: `V` at the first step at which the critic was asked, in units of reward; None if it never was.
        kl: KL divergence from the reference in nats, summed over its tokens.
        guidance: its other options.
    """

    critic: str
    method: str
    eta: float
    value: float | None
    kl: float
    guidance: Mapping[str, Any] | None = None

    @property
    def binds(self) -> bool:
        """Whether `value` says what is to be expected.

        Then the critic was asked, nothing held its guidance back, and no search chose the rollout among others, or cut
        it.
        """
        altered = self.guidance is not None and any(name in self.guidance for name in (*BUDGETS, "search"))
        return self.value is not None and self.method == Method.QSHARP and not altered


class RewardResult(NamedTuple):
    """What became of a reward that was given.

    Attributes:
        reward: the rollout's present reward.
        changed: whether it is another one than before.
        prediction: of a guided rollout; None for others.
        history: all rewards that the rollout has now, oldest first.
    """

    id: str
    reward: float
    changed: bool
    prediction: Prediction | None = None
    history: Sequence[Reward] = ()


class _Rewarded:
    """A rollout that is given rewards, as the database has it."""

    def __init__(self, owner: str, reward: float | None, prediction: Prediction | None) -> None:
        self.owner = owner
        self.reward = reward
        self.prediction = prediction
        self.history: list[Reward] = []

    def agreed(self, given_by: str, source: str | None) -> bool:
        """Whether this giver has said already, by this source, that the rollout's present reward is right."""
        for entry in reversed(self.history):
            if entry.reward != self.reward:
                return False
            if entry.given_by == given_by and source in (None, entry.source):
                return True
        return False


def give(connection: Connection, payloads: list[Giving]) -> list[list[RewardResult | None]]:
    """Gives rewards, in order; a result for each, which is None if the rollout does not exist for the giver.

    Then no reward of that payload is given.
    """
    known = _known(connection, sorted({item.id for giving in payloads for item in giving.items}))
    entries, answers, changed = [], [], set()
    for giving in payloads:
        found = [known.get(item.id) for item in giving.items]
        seen = [one if one is not None and giving.owner in (None, one.owner) else None for one in found]
        whole = None not in seen
        answer: list[RewardResult | None] = []
        answers.append(answer)
        for item, one in zip(giving.items, seen, strict=True):
            if one is None or not whole:
                answer.append(None if one is None else RewardResult(item.id, item.reward, False))
                continue
            new = one.reward != item.reward
            source = item.source and clean(item.source)
            if new or not one.agreed(giving.given_by, source):
                one.reward = item.reward
                entry = Reward(item.reward, source, giving.created, giving.given_by)
                one.history.append(entry)
                entries.append(to_entry(item.id, entry))
            if new:
                changed.add(item.id)
            answer.append(RewardResult(item.id, item.reward, new, one.prediction, one.history))
    if entries:
        connection.execute(insert(rewards), entries)
    if changed:
        connection.execute(
            update(rollouts).where(rollouts.c.id == bindparam("of")).values(reward=bindparam("new")),
            [{"of": name, "new": known[name].reward} for name in sorted(changed)],
        )
    return answers


def to_entry(rollout_id: str, reward: Reward) -> dict[str, object]:
    """The parameters of an insert of this reward of a rollout into `rewards`."""
    return {
        "rollout_id": rollout_id,
        "reward": reward.reward,
        "source": reward.source,
        "created": reward.created,
        "given_by": reward.given_by,
    }


def histories(connection: Connection, ids: Sequence[str]) -> dict[str, list[Reward]]:
    """The rewards of rollouts, oldest first; a rollout that has none is left out."""
    history: dict[str, list[Reward]] = {}
    query = select(rewards).order_by(rewards.c.seq)
    for part in parts(ids):
        for row in connection.execute(query.where(rewards.c.rollout_id.in_(part))):
            entry = Reward(row.reward, row.source, row.created, row.given_by)
            history.setdefault(row.rollout_id, []).append(entry)
    return history


def parts(ids: Sequence[Key]) -> Iterator[Sequence[Key]]:
    """The ids, as many at a time as a statement takes."""
    return (ids[i : i + IN] for i in range(0, len(ids), IN))


def _known(connection: Connection, ids: Sequence[str]) -> dict[str, _Rewarded]:
    columns = [rollouts.c[name] for name in ("id", "owner", "reward", *Prediction._fields)]
    query = select(*columns).order_by(rollouts.c.id).with_for_update()
    known: dict[str, _Rewarded] = {}
    for part in parts(ids):
        for name, owner, reward, *fields in connection.execute(query.where(rollouts.c.id.in_(part))):
            prediction = Prediction(*fields)
            known[name] = _Rewarded(owner, reward, None if prediction.eta is None else prediction)
    for name, history in histories(connection, [name for name, one in known.items() if one.reward is not None]).items():
        known[name].history = history
    return known
