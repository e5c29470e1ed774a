"""Rollouts from Parquet files: which of their positions may be trained on, and which prompts only measure.

A completion's reward labels position `t` only if every token after `t` was drawn from the reference, which is so from
`first_valid_position` on (docs/method.md, "Label validity"). Rollouts without such a position are left out, as are
rollouts without a reward, and both are counted.

Files are read once, some rows at a time.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qsharp_core.returns import Bernoulli, ReturnDistribution
from qsharp_core.wire.columns import LABELLED, OWNER, POLICY, REWARDS
from trainer.training.prefix_tree import PrefixTree, TokenIds, merge
from trainer.training.rollouts import INDEX, Entry, Keeper, LabelledRollout, Rollouts, SamplingPolicy
from trainer.training.settings import TrainingError
from trainer.trust import EVERYBODY, Trust, trusted_reward

AT_ONCE = 1000
"""Rows that are in memory together while files are read."""
METADATA = "metadata"
MOST_ATOMS_SHOWN = 16
UNREWARDED = -1
"""The first valid position of a rollout without a reward."""
WITHOUT = ""
"""The group of a rollout whose metadata lacks the entry that the split goes by; hashes are longer."""


@dataclass
class DataSet:
    """The rollouts of some files, sorted by id.

    Attributes:
        rollouts: the rollouts with a label.
        counts: the number of rows that were read, and of those that were left out, by reason.
    """

    rollouts: Rollouts
    counts: Counter[str] = field(default_factory=Counter)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that training reads of the rollouts, in hex."""
        sha = hashlib.sha256()
        for r in self.rollouts:
            sha.update(f"{r.id}|{r.first_valid}|{r.reward!r}|{r.group}|{len(r.prompt)}|{r.policy}\n".encode())
            sha.update(r.prompt.tobytes() + r.completion.tobytes())
        return sha.hexdigest()


def read(
    paths: Sequence[Path], group_by: str | None = None, trust: Trust = EVERYBODY, folder: Path | None = None
) -> DataSet:
    """The rollouts of all files together.

    Of a rollout that is in several files, the last row with a reward is taken.

    Args:
        paths: Parquet files, or folders of them.
        group_by: entry of the metadata that the split goes by; None for the prompt's token ids.
        trust: whose rollouts are taken, and whose rewards count.
        folder: on whose disk the tokens are kept; None is the system's folder for temporary files.

    Raises:
        TrainingError: a file cannot be read, or lacks a column or the metadata's entry; or the disk is full.
    """
    counts: Counter[str] = Counter()
    keeper = Keeper(folder)
    ids: list[pa.Array] = []
    entries: list[NDArray[np.void]] = []
    number = 0
    for batch in _batches(paths, group_by, trust):
        counts["read"] += len(batch)
        if trust.owners:
            ours = pc.is_in(batch[OWNER].cast(pa.string()), pa.array(trust.owners, pa.string()))
            counts["of_others"] += len(batch) - (pc.sum(ours).as_py() or 0)
            batch = batch.filter(ours)
        ids.append(batch["id"].cast(pa.large_string()))
        entries.append(np.array(list(_kept(batch, keeper, group_by, trust, number)), dtype=INDEX))
        number += len(batch)
    every_id = pa.concat_arrays([pa.array([], pa.large_string()), *ids])
    index = np.concatenate([np.empty(0, INDEX), *entries])
    last = _last_rewarded(every_id, index["first_valid"] != UNREWARDED)
    counts["duplicates"] += len(index) - len(last)
    index = index[last]
    rewarded = index["first_valid"] != UNREWARDED
    labelled = rewarded & (index["first_valid"] < index["completion"])
    counts["unrewarded"] += int((~rewarded).sum())
    counts["no_valid_position"] += int((rewarded & ~labelled).sum())
    index = index[labelled]
    every_id = every_id.take(pa.array(index["id"]))
    index["id"] = np.arange(len(index))
    rollouts = keeper.rollouts(index, every_id)
    if WITHOUT in rollouts.tables.groups and len(lacking := np.flatnonzero(rollouts.groups == 0)):
        raise TrainingError(
            f"rollout {rollouts.id_of(lacking[0])} has no {group_by!r} in its metadata: --group-by cannot split it"
        )
    return DataSet(rollouts, +counts)


def _last_rewarded(ids: pa.Array, rewarded: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The row of each id, in the order of ids: its last one with a reward, or its first one."""
    if not len(ids):
        return np.empty(0, np.int64)
    rows = pa.table({"id": ids, "row": pa.array(np.arange(len(ids)))})
    order = pc.sort_indices(rows, [("id", "ascending"), ("row", "ascending")]).to_numpy().astype(np.int64)
    ordered = ids.take(pa.array(order))
    first = np.ones(len(ids), dtype=bool)
    first[1:] = pc.not_equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)
    chosen = order[first]
    of_id = np.cumsum(first) - 1
    with_reward = rewarded[order]
    chosen[of_id[with_reward]] = order[with_reward]  # of several, the last one stays
    return chosen


def _batches(paths: Sequence[Path], group_by: str | None, trust: Trust) -> Iterator[pa.RecordBatch]:
    asked = ([OWNER] if trust.owners else []) + ([REWARDS] if trust.rewards_by else [])
    described = (*POLICY, *([] if group_by is None else [METADATA]))
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
                    columns = [name for name in (*LABELLED, *described, *asked) if name in names]
                    yield from parquet.iter_batches(AT_ONCE, columns=columns)
            except (OSError, pa.ArrowInvalid) as error:
                raise TrainingError(f"{file} cannot be read: {error}") from error


def _kept(batch: pa.RecordBatch, keeper: Keeper, group_by: str | None, trust: Trust, number: int) -> Iterator[Entry]:
    """Keeps the rollouts of a batch that have a label; yields entries of the index for all of them."""
    tokens = ("prompt_token_ids", "completion_token_ids")
    rows = batch.drop_columns(["id", *tokens]).to_pylist()
    for row, prompt, completion in zip(rows, *(_lists(batch[name]) for name in tokens), strict=True):
        reward = trusted_reward(row[REWARDS], trust.rewards_by) if trust.rewards_by else row["reward"]
        first, end = row["first_valid_position"], len(completion)
        first = end if first is None else min(max(first, 0), end)
        if reward is None or first == end:
            first = UNREWARDED if reward is None else end
            yield number, 0, 0, 0.0, 0, 0, 0, end, first, 0
            number += 1
            continue
        if not len(prompt) and first == 0 and end > 1:
            first = 1  # a Q head has nothing to read before the first token
        group = None if group_by is None else _group(row.get(METADATA), group_by)
        yield keeper.keep(prompt, completion, first, float(reward), SamplingPolicy.of(row), group, number)
        number += 1


def _lists(column: pa.Array) -> Iterator[TokenIds]:
    """The token ids of each row of a column of lists."""
    values = np.asarray(column.flatten(), dtype=np.int32)
    ends = np.cumsum(np.asarray(column.value_lengths().fill_null(0), dtype=np.int64))
    return iter(np.split(values, ends[:-1])) if len(ends) else iter(())


def group_of(prompt: Sequence[int], metadata: Any, group_by: str | None) -> str:
    """The group that a row is in, as the split goes by it; `WITHOUT` if the metadata lacks the entry.

    Args:
        prompt: token ids.
        metadata: of the row, a JSON string or a map.
        group_by: an entry of the metadata; None is the prompt's token ids.
    """
    if group_by is not None:
        return _group(metadata, group_by)
    return hashlib.sha256(np.asarray(prompt, dtype="<i4").tobytes()).hexdigest()


def _group(metadata: Any, key: str) -> str:
    """The hash of an entry of a row's metadata; `WITHOUT` if it is not there."""
    entries = _metadata(metadata)
    return hashlib.sha256(str(entries[key]).encode()).hexdigest() if key in entries else WITHOUT


def _metadata(value: Any) -> dict[str, Any]:
    """The metadata of a row, which is a JSON string, or a map or a struct of Parquet."""
    parsed = json.loads(value) if isinstance(value, str) else value
    return dict(parsed or {})


def merge_rollouts(rollouts: Iterable[LabelledRollout]) -> tuple[PrefixTree, list[NDArray[np.int32]]]:
    """The prefix tree of all rollouts together, and for each rollout the nodes of its valid positions."""
    sequences, starts = [], []
    for r in rollouts:
        sequences.append(r.token_ids)
        starts.append(r.start)
    tree = merge(sequences)
    return tree, [path[start:] for start, path in zip(starts, tree.paths, strict=True)]


def refuse_longer(data: DataSet, limit: int | None) -> DataSet:
    """Leaves out rollouts of more than `limit` tokens. They are never cut, because the reward is that of the whole."""
    kept = data.rollouts if limit is None else data.rollouts.select(data.rollouts.lengths <= limit)
    return DataSet(kept, data.counts + Counter(too_long=len(data.rollouts) - len(kept)))


def check(data: DataSet, returns: ReturnDistribution, vocab: int, mixed_policies: bool) -> list[SamplingPolicy]:
    """Checks that one critic can learn from all rollouts.

    Returns:
        The sampling policies of the rollouts: a single one unless `mixed_policies` is set.

    Raises:
        TrainingError: there are no rollouts, rewards or token ids are out of range, or sampling policies differ.
    """
    rollouts = data.rollouts
    if not len(rollouts):
        raise TrainingError(f"no rollout can be trained on: {dict(data.counts)}")
    low, high = returns.reward_range
    known = (low <= rollouts.rewards) & (rollouts.rewards <= high)
    if isinstance(returns, Bernoulli):
        known &= np.isin(rollouts.rewards, (0.0, 1.0))
    embedded = rollouts.greatest < vocab
    if len(wrong := np.flatnonzero(~(known & embedded))):
        first = int(wrong[0])
        if not known[first]:
            wanted = f"in [{low}, {high}]"
            if isinstance(returns, Bernoulli):
                wanted = f"0 or 1; for others give {_categorical(rollouts.rewards)}"
            raise TrainingError(
                f"rollout {rollouts.id_of(first)} has reward {rollouts.rewards[first]}: it must be {wanted}"
            )
        raise TrainingError(
            f"rollout {rollouts.id_of(first)} has token ids beyond the {vocab} that the backbone embeds"
        )
    policies = rollouts.policies
    if len(policies) > 1 and not mixed_policies:
        listed = "; ".join(f"{n} at {policy}" for policy, n in policies.items())
        raise TrainingError(
            f"rollouts of different sampling policies ({listed}): --mixed-policies trains on all of them"
        )
    return list(policies)


def _categorical(rewards: NDArray[np.float64]) -> str:
    """The flags for rewards other than 0 and 1."""
    values = np.union1d(rewards, (0.0, 1.0))  # that there are none of these yet does not mean that there will be none
    if len(values) > MOST_ATOMS_SHOWN:
        values = np.linspace(values[0], values[-1], 11)
    return f"--distribution categorical --atoms {' '.join(f'{value:.15g}' for value in values)}"


def is_held_out(group: str, fraction: float) -> bool:
    """Whether the rollouts of a group only measure. The hash alone decides, so it is the same in every round."""
    return int(group, 16) < fraction * 2**256


def split(rollouts: Rollouts, fraction: float) -> tuple[Rollouts, Rollouts]:
    """Splits rollouts into training and held-out ones, `(train, held_out)`, with no group in both.

    Raises:
        TrainingError: nothing is left to train on, or nothing is held out although `fraction` is not 0.
    """
    groups = np.array([is_held_out(group, fraction) for group in rollouts.tables.groups], dtype=bool)
    measures = groups[rollouts.groups]
    train, held_out = rollouts.select(~measures), rollouts.select(measures)
    if not len(train) or (fraction > 0 and not len(held_out)):
        number = len(np.unique(rollouts.groups))
        empty = "left to train on" if not len(train) else "held out (0 turns it off)"
        raise TrainingError(f"of {number} prompts none is {empty}: choose another --held-out than {fraction}")
    return train, held_out


def without_uniform_prompts(rollouts: Rollouts) -> Rollouts:
    """Leaves out prompts whose rollouts all have one reward: they do not tell which token is better."""
    prompts, rewards = rollouts.prompts, rollouts.rewards
    least, greatest = (np.full(prompts.max(initial=-1) + 1, bound) for bound in (np.inf, -np.inf))
    np.minimum.at(least, prompts, rewards)
    np.maximum.at(greatest, prompts, rewards)
    return rollouts.select((least < greatest)[prompts])
