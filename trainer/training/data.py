"""Rollouts from Parquet files: which of their positions may be trained on, and which prompts only measure.

A completion's reward labels position `t` only if every token after `t` was drawn from the reference, which is so from
`first_valid_position` on (docs/method.md, "Label validity"). Rollouts without such a position are left out, as are
rollouts without a reward, and both are counted.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qsharp_core.returns import Bernoulli, ReturnDistribution
from qsharp_core.wire.columns import DESCRIBED, LABELLED, OWNER, REWARDS
from trainer.training.prefix_tree import PrefixTree, TokenIds, merge
from trainer.training.settings import TrainingError
from trainer.trust import EVERYBODY, Trust, trusted_reward

Row = dict[str, Any]
"""A row of a Parquet file, by column."""
REQUIRED = ("id", "prompt_token_ids", "completion_token_ids", "first_valid_position", "reward")
OPTIONAL = ("temperature", "top_p", "top_k", "min_p", "metadata")


@dataclass(frozen=True, order=True)
class SamplingPolicy:
    """How tokens were drawn from the model: together with it, this is the reference policy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @classmethod
    def of(cls, row: Row) -> "SamplingPolicy":
        """The policy of a stored rollout; null, and the values by which vLLM says "off", are the default."""

        def number(name: str, default: float) -> float:
            value = row.get(name)
            # Parquet may hold float32: 0.7 must equal 0.7.
            return default if value is None else round(float(value), 6)

        return cls(
            number("temperature", 1.0), number("top_p", 1.0), max(int(number("top_k", 0)), 0), number("min_p", 0.0)
        )


@dataclass(frozen=True, eq=False)
class LabelledRollout:
    """A completion with its reward. Its positions from `first_valid` on may be trained on; there is at least one.

    Attributes:
        id: of the rollout.
        prompt, completion: token ids.
        first_valid: the first position of the completion that may be trained on.
        reward: of the whole completion.
        policy: how it was sampled.
        group: a hash of what the split goes by; rollouts with the same group are on the same side.
        weights: of the valid positions in the loss, `[valid]`; None means equal weights that sum to 1.
    """

    id: str
    prompt: TokenIds
    completion: TokenIds
    first_valid: int
    reward: float
    policy: SamplingPolicy
    group: str
    weights: NDArray[np.float64] | None = None

    @property
    def length(self) -> int:
        """The number of tokens of prompt and completion."""
        return len(self.prompt) + len(self.completion)

    @property
    def token_ids(self) -> TokenIds:
        """The token ids of prompt and completion."""
        return np.concatenate([self.prompt, self.completion])

    @property
    def start(self) -> int:
        """The index of the first valid position in `token_ids`."""
        return len(self.prompt) + self.first_valid

    @property
    def valid(self) -> int:
        """The number of positions that may be trained on."""
        return len(self.completion) - self.first_valid


@dataclass
class DataSet:
    """The rollouts of some files, sorted by id.

    Attributes:
        rollouts: the rollouts with a label.
        counts: the number of rows that were read, and of those that were left out, by reason.
    """

    rollouts: list[LabelledRollout]
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def digest(self) -> str:
        """SHA-256 over everything that training reads of the rollouts, in hex."""
        sha = hashlib.sha256()
        for r in self.rollouts:
            sha.update(f"{r.id}|{r.first_valid}|{r.reward!r}|{r.group}|{len(r.prompt)}|{r.policy}\n".encode())
            sha.update(r.prompt.tobytes() + r.completion.tobytes())
        return sha.hexdigest()


def read(paths: Sequence[Path], group_by: str | None = None, trust: Trust = EVERYBODY) -> DataSet:
    """The rollouts of all files together.

    Of a rollout that is in several files, the last row with a reward is taken.

    Args:
        paths: Parquet files, or folders of them.
        group_by: entry of the metadata that the split goes by; None for the prompt's token ids.
        trust: whose rollouts are taken, and whose rewards count.

    Raises:
        TrainingError: a file cannot be read, or lacks a column or the metadata's entry.
    """
    counts: Counter[str] = Counter()
    by_id: dict[str, Row] = {}
    for row in _rows(paths, trust):
        counts["read"] += 1
        if trust.owners and row[OWNER] not in trust.owners:
            counts["of_others"] += 1
            continue
        if trust.rewards_by:
            row["reward"] = trusted_reward(row[REWARDS], trust.rewards_by)
        known = by_id.get(row["id"])
        if known is not None:
            counts["duplicates"] += 1
            if row["reward"] is None:
                continue
        by_id[row["id"]] = row
    rollouts = []
    for key in sorted(by_id):
        row = by_id[key]
        first = row["first_valid_position"]
        if row["reward"] is None:
            counts["unrewarded"] += 1
        elif first is None or first >= len(row["completion_token_ids"]):
            counts["no_valid_position"] += 1
        else:
            rollouts.append(_rollout(row, group_by))
    return DataSet(rollouts, counts)


def _rows(paths: Sequence[Path], trust: Trust) -> Iterator[Row]:
    asked = ([OWNER] if trust.owners else []) + ([REWARDS] if trust.rewards_by else [])
    for path in paths:
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise TrainingError(f"no *.parquet in {path}")
        for file in files:
            try:
                with pq.ParquetFile(file) as parquet:
                    names = set(parquet.schema_arrow.names)
                    if missing := [name for name in LABELLED if name not in names]:
                        raise TrainingError(f"{file} has no column {', '.join(missing)}: not an export of rollouts")
                    if missing := [name for name in asked if name not in names]:
                        raise TrainingError(f"{file} has no column {', '.join(missing)}: it is older than owners are")
                    columns = [name for name in (*LABELLED, *DESCRIBED, *asked) if name in names]
                    for batch in parquet.iter_batches(columns=columns):
                        yield from _batch_rows(batch)
            except (OSError, pa.ArrowInvalid) as error:
                raise TrainingError(f"{file} cannot be read: {error}") from error


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    """Yields rows as dicts with token ids as arrays, because Python lists of them take ten times the memory."""
    tokens = ("prompt_token_ids", "completion_token_ids")
    plain = batch.drop_columns(list(tokens)).to_pylist()
    arrays = {name: batch.column(name) for name in tokens}
    for i, row in enumerate(plain):
        for name in tokens:
            row[name] = np.asarray(arrays[name][i].values, dtype=np.int32)
        yield row


def _rollout(row: Row, group_by: str | None) -> LabelledRollout:
    prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
    first = max(row["first_valid_position"], 0)
    if not len(prompt) and first == 0 and len(completion) > 1:
        first = 1  # a Q head has nothing to read before the first token
    if group_by is None:
        group = prompt.astype("<i4").tobytes()
    else:
        metadata = _metadata(row.get("metadata"))
        if group_by not in metadata:
            raise TrainingError(f"rollout {row['id']} has no {group_by!r} in its metadata: --group-by cannot split it")
        group = str(metadata[group_by]).encode()
    return LabelledRollout(
        id=row["id"],
        prompt=prompt,
        completion=completion,
        first_valid=first,
        reward=float(row["reward"]),
        policy=SamplingPolicy.of(row),
        group=hashlib.sha256(group).hexdigest(),
    )


def _metadata(value: Any) -> dict[str, Any]:
    """The metadata of a row, which is a JSON string, or a map or a struct of Parquet."""
    parsed = json.loads(value) if isinstance(value, str) else value
    return dict(parsed or {})


def merge_rollouts(rollouts: Sequence[LabelledRollout]) -> tuple[PrefixTree, list[NDArray[np.int32]]]:
    """The prefix tree of all rollouts together, and for each rollout the nodes of its valid positions."""
    tree = merge([r.token_ids for r in rollouts])
    return tree, [path[r.start :] for r, path in zip(rollouts, tree.paths, strict=True)]


def refuse_longer(data: DataSet, limit: int | None) -> DataSet:
    """Leaves out rollouts of more than `limit` tokens. They are never cut, because the reward is that of the whole."""
    kept = [r for r in data.rollouts if limit is None or r.length <= limit]
    return DataSet(kept, data.counts + Counter(too_long=len(data.rollouts) - len(kept)))


def check(data: DataSet, returns: ReturnDistribution, vocab: int, mixed_policies: bool) -> list[SamplingPolicy]:
    """Checks that one critic can learn from all rollouts.

    Returns:
        The sampling policies of the rollouts: a single one unless `mixed_policies` is set.

    Raises:
        TrainingError: there are no rollouts, rewards or token ids are out of range, or sampling policies differ.
    """
    if not data.rollouts:
        raise TrainingError(f"no rollout can be trained on: {dict(data.counts)}")
    low, high = returns.reward_range
    for r in data.rollouts:
        if not low <= r.reward <= high or (isinstance(returns, Bernoulli) and r.reward not in (0.0, 1.0)):
            wanted = (
                "0 or 1 (or use --distribution categorical)"
                if isinstance(returns, Bernoulli)
                else f"in [{low}, {high}]"
            )
            raise TrainingError(f"rollout {r.id} has reward {r.reward}: it must be {wanted}")
        if max(r.prompt.max(initial=0), r.completion.max(initial=0)) >= vocab:
            raise TrainingError(f"rollout {r.id} has token ids beyond the {vocab} that the backbone embeds")
    policies = Counter(r.policy for r in data.rollouts)
    if len(policies) > 1 and not mixed_policies:
        listed = "; ".join(f"{n} at {policy}" for policy, n in sorted(policies.items()))
        raise TrainingError(
            f"rollouts of different sampling policies ({listed}): --mixed-policies trains on all of them"
        )
    return sorted(policies)


def is_held_out(group: str, fraction: float) -> bool:
    """Whether the rollouts of a group only measure. The hash alone decides, so it is the same in every round."""
    return int(group, 16) < fraction * 2**256


def split(rollouts: Sequence[LabelledRollout], fraction: float) -> tuple[list[LabelledRollout], list[LabelledRollout]]:
    """Splits rollouts into training and held-out ones, `(train, held_out)`, with no group in both.

    Raises:
        TrainingError: nothing is left to train on, or nothing is held out although `fraction` is not 0.
    """
    sides: tuple[list[LabelledRollout], list[LabelledRollout]] = ([], [])
    for r in rollouts:
        sides[is_held_out(r.group, fraction)].append(r)
    train, held_out = sides
    if not train or (fraction > 0 and not held_out):
        groups = len({r.group for r in rollouts})
        empty = "left to train on" if not train else "held out (0 turns it off)"
        raise TrainingError(f"of {groups} prompts none is {empty}: choose another --held-out than {fraction}")
    return train, held_out


def without_uniform_prompts(rollouts: Sequence[LabelledRollout]) -> list[LabelledRollout]:
    """Leaves out prompts whose rollouts all have one reward: they do not tell which token is better."""
    rewards: dict[bytes, set[float]] = defaultdict(set)
    for r in rollouts:
        rewards[r.prompt.tobytes()].add(r.reward)
    return [r for r in rollouts if len(rewards[r.prompt.tobytes()]) > 1]
