"""KL divergence of a fine-tuned model from the reference, estimated on the fine-tuned model's own samples.

For a completion `y` that the model `π` drew after a prompt,

    log-ratio  = Σ_t log π(y_t | y_<t) − log π_ref(y_t | y_<t)
    KL by step = Σ_t KL(π(· | y_<t) ‖ π_ref(· | y_<t))

have the same mean over the model's samples: its KL divergence. The second varies less, and is what the server reports
of a guided completion. Both policies end completions by the same rule, so that a stop string adds nothing.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from trainer.training.prefix_tree import shared_prefix

TOGETHER = 1024
"""Tokens of a batch: the logits of two models for each of them are in memory."""


@dataclass(frozen=True)
class Completion:
    """Token ids of a prompt and a completion together, and how many of them are the completion's."""

    token_ids: Sequence[int]
    length: int


@dataclass(frozen=True)
class Divergence:
    """What a completion says of the KL divergence, in nats: two estimates with the same mean."""

    log_ratio: float
    by_step: float


def divergences(model: Path, reference: Path, completions: Sequence[Completion]) -> list[Divergence]:
    """The estimates of each completion, in float32.

    Args:
        model: folder of the model that drew them, at temperature 1.
        reference: folder of the other one.
        completions: what was drawn; those of no tokens say 0.
    """
    found = [Divergence(0.0, 0.0)] * len(completions)
    drawn = [i for i, one in enumerate(completions) if one.length]
    shared = _shared([completions[i] for i in drawn])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode(), tqdm(total=len(drawn), unit="completion", desc="KL") as bar:
        readers = [_Reader(folder, shared, device) for folder in (model, reference)]
        for batch in _batches(completions, drawn, len(shared)):
            ids = [torch.tensor(completions[i].token_ids[len(shared) :], device=device) for i in batch]
            padded_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            policy_BTV, reference_BTV = (reader.log_probs(padded_BT) for reader in readers)
            for row, i in enumerate(batch):
                of = slice(len(ids[row]) - completions[i].length - 1, len(ids[row]) - 1)
                found[i] = _divergence(policy_BTV[row, of], reference_BTV[row, of], ids[row][-completions[i].length :])
            bar.update(len(batch))
    return found


def _divergence(policy_TV: torch.Tensor, reference_TV: torch.Tensor, drawn_T: torch.Tensor) -> Divergence:
    ratio_TV = policy_TV - reference_TV
    log_ratio = ratio_TV.gather(1, drawn_T[:, None]).sum().item()
    return Divergence(log_ratio, (policy_TV.exp() * ratio_TV).sum().item())


class _Reader:
    """A model that has read what all completions begin with."""

    def __init__(self, folder: Path, shared: Sequence[int], device: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self._cache: Any = None
        if shared:
            read_1T = torch.tensor([shared], device=device)
            self._cache = self._model(read_1T, use_cache=True, logits_to_keep=1).past_key_values

    def log_probs(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of what follows each token, `[B, T, V]`; nobody reads those after a row's end."""
        cache = copy.deepcopy(self._cache)
        if cache is not None:
            cache.batch_repeat_interleave(len(ids_BT))
        logits_BTV = self._model(ids_BT, past_key_values=cache, use_cache=cache is not None).logits
        return torch.log_softmax(logits_BTV.float(), -1)


def _shared(completions: Sequence[Completion]) -> Sequence[int]:
    """What all of them begin with; of a prompt all but its last token at most, as that predicts the completion."""
    if not completions:
        return []
    first, last = (np.array(end([*one.token_ids] for one in completions), np.int32) for end in (min, max))
    most = min(len(one.token_ids) - one.length for one in completions) - 1
    return completions[0].token_ids[: min(shared_prefix(first, last), most)]


def _batches(completions: Sequence[Completion], chosen: Sequence[int], shared: int) -> Iterator[list[int]]:
    """Batches of about the same length, by index."""
    batch: list[int] = []
    for i in sorted(chosen, key=lambda i: len(completions[i].token_ids)):
        if batch and (len(batch) + 1) * (len(completions[i].token_ids) - shared) > TOGETHER:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
