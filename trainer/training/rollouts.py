"""Rollouts with labels, of which memory holds an index alone: their tokens are on disk, and read when they are needed.

Shapes: R rollouts.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.training.prefix_tree import TokenIds
from trainer.training.spill import Spill

Row = Mapping[str, Any]
"""A row of a Parquet file, by column."""


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


class Indexed(Protocol):
    """Rollouts by their index: all of them, or those that are in memory for a step."""

    def __getitem__(self, index: int, /) -> LabelledRollout: ...


INDEX = np.dtype(
    [
        ("id", "i8"),
        ("place", "i8"),
        ("weights", "i8"),
        ("reward", "f8"),
        ("prompt", "i4"),
        ("group", "i4"),
        ("policy", "i4"),
        ("completion", "i4"),
        ("first_valid", "i4"),
        ("greatest", "i4"),
    ]
)
"""What memory holds of a rollout, 56 bytes: where its id, tokens and weights are, and what must be known of all."""
Entry = tuple[float | int, ...]
"""An entry of an index, field by field."""


@dataclass(frozen=True, eq=False)
class Tables:
    """What the entries of an index refer to.

    Attributes:
        tokens: prompts, each once, and completions.
        ids: of rollouts.
        prompts: place and length of each prompt among the tokens, `[P, 2]`.
        groups: a hash of each group, ascending.
        policies: that occur.
        weights: of valid positions in the loss, before they are scaled; None means equal weights.
        scale: of the weights.
    """

    tokens: Spill[np.int32]
    ids: pa.Array
    prompts: NDArray[np.int64]
    groups: list[str]
    policies: list[SamplingPolicy]
    weights: Spill[np.float64] | None = None
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Labelled rollouts. Arrays have an entry for each rollout; a rollout as such is read from disk."""

    index: NDArray[np.void]
    tables: Tables

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[LabelledRollout]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int, /) -> LabelledRollout:
        one, tables = self.index[index], self.tables
        first_valid, completion = int(one["first_valid"]), int(one["completion"])
        weights = None
        if tables.weights is not None:
            weights = tables.weights.read(int(one["weights"]), completion - first_valid) * tables.scale
        return LabelledRollout(
            id=self.id_of(index),
            prompt=self.prompt(int(one["prompt"])),
            completion=tables.tokens.read(int(one["place"]), completion),
            first_valid=first_valid,
            reward=float(one["reward"]),
            policy=tables.policies[one["policy"]],
            group=tables.groups[one["group"]],
            weights=weights,
        )

    def held(self, indices: Iterable[int]) -> dict[int, LabelledRollout]:
        """Some rollouts in memory, by index."""
        return {i: self[i] for i in indices}

    def select(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Rollouts":
        """Some of the rollouts, by a mask `[R]` or by index."""
        return Rollouts(self.index[chosen], self.tables)

    def weighed(self, weights: Spill[np.float64], places: NDArray[np.int64], scale: float) -> "Rollouts":
        """The same rollouts with weights.

        Args:
            weights: of valid positions.
            places: of each rollout's first weight, `[R]`.
            scale: of all weights.
        """
        index = self.index.copy()
        index["weights"] = places
        return Rollouts(index, replace(self.tables, weights=weights, scale=scale))

    def id_of(self, index: int) -> str:
        """The id of a rollout."""
        return str(self.tables.ids[int(self.index[index]["id"])])

    def prompt(self, number: int) -> TokenIds:
        """The token ids of a prompt, by its number."""
        place, length = self.tables.prompts[number].tolist()
        return self.tables.tokens.read(place, length)

    @property
    def prompts(self) -> NDArray[np.int32]:
        """The number of each rollout's prompt; the same tokens have the same number."""
        return self.index["prompt"]

    @property
    def groups(self) -> NDArray[np.int32]:
        """The number of each rollout's group, in the order of their hashes."""
        return self.index["group"]

    @property
    def completions(self) -> NDArray[np.int64]:
        """The number of tokens of each completion."""
        return self.index["completion"].astype(np.int64)

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each rollout's prompt."""
        return self.tables.prompts[self.prompts, 1]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each rollout's prompt and completion."""
        return self.prompt_lengths + self.completions

    @property
    def first_valid(self) -> NDArray[np.int64]:
        """The first position of each completion that may be trained on."""
        return self.index["first_valid"].astype(np.int64)

    @property
    def valid(self) -> NDArray[np.int64]:
        """The number of each rollout's positions that may be trained on."""
        return self.completions - self.first_valid

    @property
    def rewards(self) -> NDArray[np.float64]:
        """The rewards."""
        return self.index["reward"]

    @property
    def greatest(self) -> NDArray[np.int32]:
        """The greatest token id of each rollout."""
        return self.index["greatest"]

    @property
    def policies(self) -> dict[SamplingPolicy, int]:
        """The sampling policies that occur, sorted, and the number of rollouts of each."""
        numbers, counts = np.unique(self.index["policy"], return_counts=True)
        found = [(self.tables.policies[n], count) for n, count in zip(numbers, counts.tolist(), strict=True)]
        return dict(sorted(found))


@dataclass
class Keeper:
    """Takes rollouts one by one, and keeps their tokens on disk.

    Args:
        folder: on whose disk.
    """

    folder: Path | None = None
    _tokens: Spill[np.int32] = field(init=False)
    _prompts: dict[bytes, int] = field(default_factory=dict)
    _places: list[tuple[int, int]] = field(default_factory=list)
    _groups: dict[str, int] = field(default_factory=dict)
    _policies: dict[SamplingPolicy, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tokens = Spill(np.int32, self.folder)

    def keep(
        self,
        prompt: TokenIds,
        completion: TokenIds,
        first_valid: int,
        reward: float,
        policy: SamplingPolicy,
        group: str | None,
        number: int,
    ) -> Entry:
        """Keeps a rollout; returns its entry of the index.

        Args:
            prompt, completion, first_valid, reward, policy: see `LabelledRollout`.
            group: the same; None is a hash of the prompt's tokens.
            number: of its id.
        """
        digest = hashlib.sha256(prompt.astype("<i4").tobytes())
        known = self._prompts.setdefault(digest.digest(), len(self._prompts))
        if known == len(self._places):
            self._places.append((self._tokens.add(prompt), len(prompt)))
        group = digest.hexdigest() if group is None else group
        return (
            number,
            self._tokens.add(completion),
            0,
            reward,
            known,
            self._groups.setdefault(group, len(self._groups)),
            self._policies.setdefault(policy, len(self._policies)),
            len(completion),
            first_valid,
            max(int(prompt.max(initial=0)), int(completion.max(initial=0))),
        )

    def rollouts(self, index: NDArray[np.void], ids: pa.Array) -> Rollouts:
        """All that was kept, or some of it.

        Args:
            index: entries that `keep` has returned, `[R]` of `INDEX`.
            ids: what the entries' numbers refer to.
        """
        # Groups are numbered by their hashes, whatever the order in which they came.
        groups = sorted(self._groups)
        rank = np.empty(len(groups), dtype=np.int32)
        rank[[self._groups[group] for group in groups]] = np.arange(len(groups))
        index["group"] = rank[index["group"]] if len(index) else index["group"]
        prompts = np.array(self._places, dtype=np.int64).reshape(-1, 2)
        return Rollouts(index, Tables(self._tokens, ids, prompts, groups, list(self._policies)))


def kept(rollouts: Iterable[LabelledRollout], folder: Path | None = None) -> Rollouts:
    """Rollouts that are in memory, kept as those of files are; weights of their own are left out."""
    keeper = Keeper(folder)
    entries: list[Entry] = []
    ids: list[str] = []
    for r in rollouts:
        entries.append(
            keeper.keep(r.prompt, r.completion, r.first_valid, r.reward, r.policy, r.group, number=len(entries))
        )
        ids.append(r.id)
    return keeper.rollouts(np.array(entries, dtype=INDEX), pa.array(ids, pa.large_string()))
