"""Features of a prefix tree's nodes: read from the store, after the reference was run for those that it lacks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.training.features.extract import ReferenceModel, extract
from trainer.training.features.store import FeatureStore, Shard, as_keys
from trainer.training.prefix_tree import PrefixTree


@dataclass(frozen=True, eq=False)
class Features:
    """What a head reads at M nodes. Hidden states stay on disk until they are asked for.

    Attributes:
        tokens_M: the nodes' own tokens, int64.
        log_ref_M: the tokens' log-probabilities after their prefixes, float32.
    """

    tokens_M: Tensor
    log_ref_M: Tensor
    _shards: Sequence[Shard]
    _shard_M: Tensor
    _row_M: Tensor

    def __len__(self) -> int:
        return len(self.tokens_M)

    @property
    def width(self) -> int:
        """The width of a hidden state, D."""
        return self._shards[0].hidden_RD.shape[1]

    def hidden(self, index: Tensor) -> Tensor:
        """The hidden states before some of the nodes, by index `[n]`: `[n, D]` bfloat16."""
        shards, rows = self._shard_M[index], self._row_M[index]
        states = torch.empty(len(index), self.width, dtype=torch.bfloat16)
        for number in shards.unique().tolist():
            chosen = shards == number
            states[chosen] = self._shards[number].hidden_RD[rows[chosen]]
        return states


def joined(parts: Sequence[Features]) -> Features:
    """The features of several trees' nodes, from one store, as one."""
    return Features(
        torch.cat([part.tokens_M for part in parts]),
        torch.cat([part.log_ref_M for part in parts]),
        parts[0]._shards,
        torch.cat([part._shard_M for part in parts]),
        torch.cat([part._row_M for part in parts]),
    )


def features(reference: ReferenceModel, store: FeatureStore, tree: PrefixTree, nodes: NDArray[np.int64]) -> Features:
    """The features of nodes, in the order of the nodes.

    Args:
        reference: is run for features that the store lacks.
        store: has the others.
        tree: the nodes' tree.
        nodes: `[M]`; each has a parent.

    Raises:
        TrainingError: the store has no room for what it lacks.
    """
    keys = as_keys(tree.keys_N[nodes])
    shard, place = store.find(keys)
    if (shard < 0).any():
        extract(reference, tree, nodes[shard < 0], store)
        shard, place = store.find(keys)
    row, log_ref = torch.empty(len(nodes), dtype=torch.int64), torch.empty(len(nodes))
    for number in np.unique(shard):
        chosen = torch.from_numpy(shard == number)
        places = torch.from_numpy(place)[chosen]
        row[chosen], log_ref[chosen] = store.shards[number].rows_E[places], store.shards[number].log_ref_E[places]
    return Features(
        torch.from_numpy(tree.tokens_N[nodes].astype(np.int64)), log_ref, store.shards, torch.from_numpy(shard), row
    )
