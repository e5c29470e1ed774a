"""Rollouts from Parquet files: which of their positions may be trained on, and which prompts only measure.

The label rule (DESIGN.md, section 2): a critic is about rollouts of the *reference*, so a completion's reward labels
position `t` only if every token after `t` was drawn from the reference, which is so from `first_valid_position` on.
Rollouts without such a position are refused, as are those without a reward, and every refusal is counted.
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
from qsharp_core.wire.columns import DESCRIBED, LABELLED
from trainer.training.settings import TrainingError

TokenIds = NDArray[np.int32]


@dataclass(frozen=True, order=True)
class SamplingPolicy:
    """What makes a model's next-token law the reference policy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @classmethod
    def of(cls, row: dict[str, Any]) -> "SamplingPolicy":
        """Of a stored rollout; null and vLLM's ways to say "off" are the default."""

        def number(name: str, default: float) -> float:
            value = row.get(name)
            # Parquet may hold float32: 0.7 must equal 0.7.
            return default if value is None else round(float(value), 6)

        return cls(
            number("temperature", 1.0), number("top_p", 1.0), max(int(number("top_k", 0)), 0), number("min_p", 0.0)
        )


@dataclass(frozen=True, eq=False)
class Rollout:
    """A completion with its reward, positions `first_valid …` of which may be trained on (at least one).

    `weights` are those positions' in the loss, `[valid]`; None: all alike, 1 together.
    """

    id: str
    prompt: TokenIds
    completion: TokenIds
    first_valid: int
    reward: float
    policy: SamplingPolicy
    group: str  # hash of what the split goes by
    weights: NDArray[np.float64] | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.completion)

    @property
    def token_ids(self) -> TokenIds:
        """Prompt and completion."""
        return np.concatenate([self.prompt, self.completion])

    @property
    def order(self) -> bytes:
        """Sorts rollouts by their tokens, so that those with a common prefix are neighbours."""
        return self.token_ids.astype(">i4").tobytes()

    @property
    def valid(self) -> int:
        """How many positions may be trained on."""
        return len(self.completion) - self.first_valid


@dataclass
class DataSet:
    """What the files hold, sorted by id.

    Attributes:
        rollouts: those with a label.
        counts: rows read, and why rows were left out.
    """

    rollouts: list[Rollout]
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def digest(self) -> str:
        """SHA-256 over all that training sees of the rollouts."""
        sha = hashlib.sha256()
        for r in self.rollouts:
            sha.update(f"{r.id}|{r.first_valid}|{r.reward!r}|{r.group}|{len(r.prompt)}|{r.policy}\n".encode())
            sha.update(r.prompt.tobytes() + r.completion.tobytes())
        return sha.hexdigest()


def read(paths: Sequence[Path], group_by: str | None = None) -> DataSet:
    """The rollouts of all files together.

    A rollout that is in several files is taken once: its last row that has a reward.

    Args:
        paths: Parquet files, or folders of them.
        group_by: entry of the metadata that the split goes by; None for the prompt's token ids.

    Raises:
        TrainingError: a file cannot be read, or lacks a column or the metadata's entry.
    """
    counts: Counter[str] = Counter()
    by_id: dict[str, dict[str, Any]] = {}
    for row in _rows(paths):
        counts["read"] += 1
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


def _rows(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
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
                    columns = [name for name in (*LABELLED, *DESCRIBED) if name in names]
                    for batch in parquet.iter_batches(columns=columns):
                        yield from _batch_rows(batch)
            except (OSError, pa.ArrowInvalid) as error:
                raise TrainingError(f"{file} cannot be read: {error}") from error


def _batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows as dicts; token ids as arrays, because Python lists of them take ten times the memory."""
    tokens = ("prompt_token_ids", "completion_token_ids")
    plain = batch.drop_columns(list(tokens)).to_pylist()
    arrays = {name: batch.column(name) for name in tokens}
    for i, row in enumerate(plain):
        for name in tokens:
            row[name] = np.asarray(arrays[name][i].values, dtype=np.int32)
        yield row


def _rollout(row: dict[str, Any], group_by: str | None) -> Rollout:
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
    return Rollout(
        id=row["id"],
        prompt=prompt,
        completion=completion,
        first_valid=first,
        reward=float(row["reward"]),
        policy=SamplingPolicy.of(row),
        group=hashlib.sha256(group).hexdigest(),
    )


def _metadata(value: Any) -> dict[str, Any]:
    """A JSON string, or Parquet's maps and structs."""
    parsed = json.loads(value) if isinstance(value, str) else value
    return dict(parsed or {})


def refuse_longer(data: DataSet, limit: int | None) -> DataSet:
    """Without the rollouts that the backbone has no positions for; a completion is never cut, its reward is of all."""
    kept = [r for r in data.rollouts if limit is None or r.length <= limit]
    return DataSet(kept, data.counts + Counter(too_long=len(data.rollouts) - len(kept)))


def check(data: DataSet, returns: ReturnDistribution, vocab: int, mixed_policies: bool) -> list[SamplingPolicy]:
    """Whether one critic can learn from all of them.

    Returns:
        The sampling policies there are, one unless `mixed_policies`.

    Raises:
        TrainingError: nothing to train on, rewards or token ids out of range, or different sampling policies.
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
    """Whether a group's prompts only measure. It hangs on its hash alone, so it is the same in every round."""
    return int(group, 16) < fraction * 2**256


def split(rollouts: Sequence[Rollout], fraction: float) -> tuple[list[Rollout], list[Rollout]]:
    """Training and held-out rollouts: `(train, held_out)`, with no group in both.

    Raises:
        TrainingError: one side is empty though it should not be.
    """
    sides: tuple[list[Rollout], list[Rollout]] = ([], [])
    for r in rollouts:
        sides[is_held_out(r.group, fraction)].append(r)
    train, held_out = sides
    if not train or (fraction > 0 and not held_out):
        groups = len({r.group for r in rollouts})
        empty = "left to train on" if not train else "held out (0 turns it off)"
        raise TrainingError(f"of {groups} prompts none is {empty}: choose another --held-out than {fraction}")
    return train, held_out


def without_uniform_prompts(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Without the rollouts of prompts that always earned the same: they say nothing about which token is better."""
    rewards: dict[bytes, set[float]] = defaultdict(set)
    for r in rollouts:
        rewards[r.prompt.tobytes()].add(r.reward)
    return [r for r in rollouts if len(rewards[r.prompt.tobytes()]) > 1]
