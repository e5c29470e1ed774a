"""The reference run over prefixes: the hidden state that its language-model head reads, and log-probabilities.

Prefixes run as trees, each once. What all of them begin with, a few-shot prompt for instance, is run before all passes,
and its keys and values are kept. Where prefixes share too little for a tree to pay, and with a model that does not obey
a tree's mask, paths run as padded rows.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from qsharp_core.critic.reference import identify
from trainer.training.base import quiet
from trainer.training.features.passes import TreePass, common_chain, cut, needed, tokens_of_paths
from trainer.training.features.store import BYTES, FeatureStore, as_keys
from trainer.training.prefix_tree import NO_NODE, PrefixTree, ancestors, visible
from trainer.training.rows import WORTHWHILE, padded_passes
from trainer.training.settings import TrainingError

PASS_NODES = {"cpu": 256, "cuda": 2048}
# A shard is written when it is large enough, or so much work would be lost by a kill.
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 60.0
LOGITS_AT_ONCE = 256  # rows whose log-softmax is in memory together
# A tree's hidden states differ from a row's by rounding only; of their size.
TREE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


class ReferenceModel:
    """A reference whose hidden states and log-probabilities are read.

    Args:
        folder: of a Hugging Face language model.
        dtype: of the passes.
        device: of the passes.
        temperature: at which log-probabilities of next tokens are taken.

    Raises:
        TrainingError: it is no language model.
        CriticError: the model cannot be identified.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, temperature: float = 1.0) -> None:
        self.identity = identify(folder)
        self.device = device
        self.dtype = dtype
        self.temperature = temperature
        self._folder = folder
        self._model: Any = None

    @property
    def digest(self) -> str:
        """A digest of everything that decides the features, except the tokens."""
        about = [self.identity.model_dump(), str(self.dtype), self.temperature]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def model(self) -> Any:
        """The model. It is loaded when it is asked for, because known features need no model."""
        if self._model is None:
            try:
                with quiet():
                    model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=self.dtype, local_files_only=True)
            except (OSError, ValueError) as error:
                raise TrainingError(f"{self._folder} is no Hugging Face language model: {error}") from error
            self._model = model.to(self.device).eval().requires_grad_(False)
        return self._model

    @property
    def pass_nodes(self) -> int:
        """The number of nodes of a pass."""
        return PASS_NODES.get(self.device.type, PASS_NODES["cpu"])

    @torch.inference_mode()
    def read(
        self, rows: list[int], places: list[int], cache: DynamicCache | None = None, **inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs rows, and reads hidden states `[n, D]` and logits `[n, V]` at some of their positions.

        Args:
            rows: the row of each position, `[n]`.
            places: each position in its row, `[n]`.
            cache: keys and values of what comes before the rows.
            inputs: of the model, `input_ids` `[B, S]` among them.
        """
        states: list[Tensor] = []

        def choose(_: Any, inputs_of_head: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states.append(inputs_of_head[0][rows, places])
            return (states[0][None], *inputs_of_head[1:])

        # Logits are large, so the head is asked for those that are read, in any row.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(choose)
        try:
            logits = self.model(
                **{name: value.to(self.device) for name, value in inputs.items()},
                past_key_values=cache,
                use_cache=cache is not None,
            ).logits[0]
        finally:
            hook.remove()
        return states[0], logits

    @torch.inference_mode()
    def begun(self, tokens: NDArray[np.int32]) -> DynamicCache:
        """The keys and values of tokens that all passes begin with."""
        cache = DynamicCache(config=self.model.config)
        if len(tokens):
            self.model(
                input_ids=torch.from_numpy(tokens[None].astype(np.int64)).to(self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return cache


@dataclass(frozen=True, eq=False)
class Read:
    """What a pass has read at nodes.

    Attributes:
        nodes: `[n]`, ascending.
        hidden: the hidden states after each node, `[n, D]`.
        logits: of the token that follows each node, `[n, V]`.
    """

    nodes: NDArray[np.int64]
    hidden: Tensor
    logits: Tensor

    def log_probs(self, rows: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """Log-probabilities of next tokens, `[E]` float32 on the host.

        Args:
            rows: the index of each token's node in `nodes`, `[E]` ascending.
            tokens: `[E]`.
            temperature: of the law.
        """
        parts = []
        for first in range(0, len(self.nodes), LOGITS_AT_ONCE):
            chosen = (rows >= first) & (rows < first + LOGITS_AT_ONCE)
            scaled = self.logits[first : first + LOGITS_AT_ONCE].float()
            if temperature != 1:
                scaled = scaled / temperature
            row, token = (rows[chosen] - first).to(scaled.device), tokens[chosen].to(scaled.device)
            parts.append((scaled[row, token] - scaled.logsumexp(-1)[row]).cpu())
        return torch.cat(parts)


def extract(reference: ReferenceModel, tree: PrefixTree, wanted: NDArray[np.int64], store: FeatureStore) -> None:
    """Runs the reference, and puts the features of nodes into the store.

    Args:
        reference: what is run.
        tree: the nodes' tree.
        wanted: nodes that have a parent. The features of a node are the hidden state before it and its log-probability.
        store: gets the features.

    Raises:
        TrainingError: the store has no room for them.
    """
    parents = tree.parents_N[wanted]
    assert (parents != NO_NODE).all()
    order = np.argsort(parents, kind="stable")
    wanted, parents = wanted[order], parents[order]
    read = np.unique(parents).astype(np.int64)
    store.make_room(len(read), len(wanted))
    buffer = _Buffer(store)
    with tqdm(total=len(read), unit="state", desc="reference", leave=False) as bar:
        for part in read_nodes(reference, tree, read):
            starts, ends = (np.searchsorted(parents, part.nodes, side) for side in ("left", "right"))
            after = wanted[np.concatenate([np.arange(*ends) for ends in zip(starts, ends, strict=True)])]
            rows = torch.from_numpy(np.repeat(np.arange(len(part.nodes)), ends - starts))
            tokens = torch.from_numpy(tree.tokens_N[after].astype(np.int64))
            buffer.add(tree.keys_N[after], rows, part.log_probs(rows, tokens, reference.temperature), part.hidden.cpu())
            bar.update(len(part.nodes))
    buffer.write()


def read_nodes(reference: ReferenceModel, tree: PrefixTree, read: NDArray[np.int64]) -> Iterator[Read]:
    """Runs the reference and yields what it says at the nodes `read` (ascending), each once."""
    nodes = needed(tree, read)
    wanted = np.zeros(len(tree), dtype=bool)
    wanted[read] = True
    chain = min(common_chain(tree, nodes), int(np.searchsorted(nodes, read[0])))
    passes = [one for one in cut(tree, nodes, chain, reference.pass_nodes) if wanted[one.nodes[one.old :]].any()]
    if chain + sum(len(one.nodes) for one in passes) > WORTHWHILE * tokens_of_paths(tree, nodes):
        yield from _rows(reference, tree, read)
        return
    cache = reference.begun(tree.tokens_N[nodes[:chain]])
    # Where most paths part, and where a path is longest: what a model may not know of trees shows there.
    parting = max(passes, key=lambda one: one.partings(tree))
    longest = max(passes, key=lambda one: int(tree.depths_N[one.nodes].max()))
    if not all(_obeys_trees(reference, tree, one, chain, cache, wanted) for one in {parting, longest}):
        yield from _rows(reference, tree, read)
        return
    for one in passes:
        yield _tree(reference, tree, one, chain, cache, wanted)


def _tree(
    reference: ReferenceModel,
    tree: PrefixTree,
    one: TreePass,
    chain: int,
    cache: DynamicCache,
    wanted: NDArray[np.bool_],
) -> Read:
    """Runs a pass and reads those of its new nodes that are wanted, of which there are some."""
    places = [i for i in range(one.old, len(one.nodes)) if wanted[one.nodes[i]]]
    seen = np.concatenate([np.ones((len(one.nodes), chain), dtype=bool), visible(tree, one.nodes)], axis=1)
    hidden, logits = reference.read(
        [0] * len(places),
        places,
        cache,
        input_ids=torch.from_numpy(tree.tokens_N[one.nodes].astype(np.int64))[None],
        position_ids=torch.from_numpy(tree.depths_N[one.nodes].astype(np.int64))[None],
        attention_mask=torch.from_numpy(seen)[None, None],
    )
    cache.crop(-len(one.nodes))
    return Read(one.nodes[places], hidden, logits)


def _rows(reference: ReferenceModel, tree: PrefixTree, read: NDArray[np.int64]) -> Iterator[Read]:
    """Runs paths as padded rows; a path that is part of a longer one is read with it.

    Padding is on the right, where no token that is read sees it: it needs no mask.
    """
    left = set(read.tolist())
    paths: list[NDArray[np.int64]] = []
    places: list[list[int]] = []
    for node in read[::-1].tolist():  # descendants before ancestors
        if node in left:
            paths.append(np.append(ancestors(tree, node), node))
            places.append([i for i, above in enumerate(paths[-1].tolist()) if above in left])
            left.difference_update(paths[-1][places[-1]].tolist())
    lengths = dict(enumerate(map(len, paths)))
    for indices in padded_passes(range(len(paths)), lengths, reference.pass_nodes):
        ids = torch.zeros(len(indices), max(lengths[i] for i in indices), dtype=torch.int64)
        found = []
        for row, i in enumerate(indices):
            ids[row, : lengths[i]] = torch.from_numpy(tree.tokens_N[paths[i]].astype(np.int64))
            found += [(int(paths[i][place]), row, place) for place in places[i]]
        nodes, rows, at = map(list, zip(*sorted(found), strict=True))
        yield Read(np.array(nodes), *reference.read(rows, at, input_ids=ids))


def _obeys_trees(
    reference: ReferenceModel,
    tree: PrefixTree,
    one: TreePass,
    chain: int,
    cache: DynamicCache,
    wanted: NDArray[np.bool_],
) -> bool:
    """Whether a pass gives what rows give, at the deepest, the middle and the last of the nodes that it reads."""
    try:
        part = _tree(reference, tree, one, chain, cache, wanted)
    except (ValueError, RuntimeError, TypeError):
        return False
    deepest = int(tree.depths_N[part.nodes].argmax())
    for place in sorted({deepest, len(part.nodes) // 2, len(part.nodes) - 1}):
        path = np.append(ancestors(tree, int(part.nodes[place])), part.nodes[place])
        ids = torch.from_numpy(tree.tokens_N[path].astype(np.int64))[None]
        row, _ = reference.read([0], [len(path) - 1], input_ids=ids)
        difference = (part.hidden[place].float() - row[0].float()).norm()
        if not difference <= TREE_TOLERANCE[reference.dtype] * row[0].float().norm():
            return False
    return True


class _Buffer:
    """Features that are not in a shard yet."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._clear()

    def _clear(self) -> None:
        self._keys: list[NDArray[np.uint8]] = []
        self._rows: list[Tensor] = []
        self._log_ref: list[Tensor] = []
        self._hidden: list[Tensor] = []
        self._held = 0
        self._since = time.monotonic()

    def add(self, keys: NDArray[np.uint8], rows: Tensor, log_ref: Tensor, hidden: Tensor) -> None:
        self._keys.append(keys)
        self._rows.append(rows + self._held)
        self._log_ref.append(log_ref)
        self._hidden.append(hidden.bfloat16())
        self._held += len(hidden)
        if self._held * hidden.shape[1] * BYTES >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        """Writes everything so far as a shard."""
        if self._held:
            keys = as_keys(np.concatenate(self._keys))
            self._store.add(keys, torch.cat(self._rows), torch.cat(self._log_ref), torch.cat(self._hidden))
        self._clear()
