"""The definitions, computed slowly: plain transformers, float64, one token at a time, nothing of `qsharp_core`.

Everything the server reports of a completion is computed here again from the model folders on disk.
"""

import copy
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from qsharp_core.wire.guidance import DEFAULT_MIN_PROB


@dataclass(frozen=True)
class Expected:
    """What should be reported of one generated token."""

    token_id: int
    kl: float
    ref_logprob: float
    logprob: float
    value: float | None
    ambiguous: bool  # the candidate set hangs on a difference below what float32 resolves
    pi: Tensor  # [V]
    log_ref: Tensor  # [V]
    strength: float = 1.0
    outputs: dict[int, Tensor] | None = None  # of each candidate, `[n_out]`; None where the critic is not asked


@lru_cache(maxsize=8)
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@lru_cache(maxsize=16)
def _critic(folder: Path) -> tuple[dict[str, Any], Any, dict[str, Tensor]]:
    card = json.loads((folder / "critic.json").read_text())
    native = card.get("backbone") == "reference"
    backbone = None if native else AutoModel.from_pretrained(folder / "backbone", dtype=torch.float64).eval()
    head = {k: v.double() for k, v in load_file(folder / "head.safetensors").items()}
    return card, backbone, head


@torch.inference_mode()
def critic_outputs(folder: Path, history: list[int], tokens: list[int]) -> Tensor:
    """The head's outputs `[K, n_out]` for `history + [y]`, by a full forward pass per candidate."""
    card, backbone, _ = _critic(folder)
    if card["head"] == "Q":
        return _read(folder, backbone(torch.tensor([history])).last_hidden_state[0, -1:], tokens)
    batch = torch.tensor([[*history, y] for y in tokens])
    return _read(folder, backbone(batch).last_hidden_state[:, -1], tokens)


def _read(folder: Path, hidden: Tensor, tokens: list[int]) -> Tensor:
    """The head on the last hidden states, `[K, D]` of a V head, `[1, D]` of a Q head: `[K, n_out]`."""
    card, _, head = _critic(folder)
    if "hidden.weight" in head:
        hidden = torch.nn.functional.gelu(hidden @ head["hidden.weight"].T + head["hidden.bias"])
    if card["head"] == "Q":
        return torch.stack([head["weight"][y] @ hidden[0] + head["bias"][y] for y in tokens])
    return hidden @ head["weight"].T + head["bias"]


class Walk:
    """`critic_outputs` along one completion, by transformers' own cache: long completions take seconds, not minutes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card, self.backbone, _ = _critic(folder)
        self.cache = DynamicCache(config=self.backbone.config)
        self.length = 0
        self.last = torch.empty(0)

    @torch.inference_mode()
    def outputs(self, history: list[int], tokens: list[int]) -> Tensor:
        """As `critic_outputs`; `history` goes on from that of the last call."""
        if self.length < len(history):
            more = torch.tensor([history[self.length :]])
            self.last = self._run(more, self.cache)
            self.length = len(history)
        if self.card["head"] == "Q":
            return _read(self.folder, self.last, tokens)
        branches = copy.deepcopy(self.cache)
        branches.batch_repeat_interleave(len(tokens))
        return _read(self.folder, self._run(torch.tensor(tokens)[:, None], branches), tokens)

    def _run(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        return self.backbone(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]


def native_outputs(folder: Path, hidden: Tensor, tokens: list[int], reference_folder: Path, log_ref: Tensor) -> Tensor:
    """`critic_outputs` of a critic on the reference's hidden states.

    Args:
        hidden: what the reference's language-model head reads after the history, `[D]`.
        log_ref: `ln ref` of the whole vocabulary there.
    """
    _, _, head = _critic(folder)

    def part(name: str, values: Tensor) -> Tensor:
        return ((values - head[f"{name}.mean"]) / head[f"{name}.scale"]) @ head[f"{name}.weight"].T

    embeddings = reference(reference_folder).get_input_embeddings().weight[tokens]
    asked = log_ref[tokens].clamp(min=head["log_ref.least"].item())[:, None]
    first = part("hidden", hidden) + part("token", embeddings) + part("log_ref", asked) + head["bias"]
    return torch.nn.functional.gelu(first) @ head["out.weight"].T + head["out.bias"]


@torch.inference_mode()
def reference_pass(folder: Path, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Logits `[S, V]`, and what the language-model head reads, `[S, D]`."""
    model, read = reference(folder), []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0][0]))
    logits = model(torch.tensor([tokens])).logits[0]
    hook.remove()
    return logits, read[0]


def atoms(card: dict[str, Any]) -> Tensor:
    return torch.tensor(card["distribution"].get("atoms", [0.0, 1.0]), dtype=torch.float64)


def probabilities(card: dict[str, Any], outputs: Tensor) -> Tensor:
    """`P(z = atom)`: `[K, n_out] -> [K, atoms]`."""
    if card["distribution"]["kind"] == "bernoulli":
        p = torch.sigmoid(outputs[:, 0])
        return torch.stack([1 - p, p], dim=1)
    return outputs.softmax(-1)


def tilts(folder: Path, outputs: Tensor, eta: float, method: str) -> Tensor:
    """`A(x, y)` of each token, from its outputs `[K, n_out]`."""
    card = _critic(folder)[0]
    p, z = probabilities(card, outputs), atoms(card)
    return (p @ z) / eta if method == "cd" else (p.log() + z / eta).logsumexp(-1)


def guided_policy(
    logits: Tensor,
    temperature: float,
    tilt_of: Any,
    r_min: float,
    eta: float | None,
    candidates: int = 20,
    min_prob: float = 0.0,
    tail: str = "floor",
) -> tuple[Tensor, Tensor, float, float | None, bool]:
    """`ln ref`, `ln pi` over the whole vocabulary, KL, value, and whether the candidate set is ambiguous.

    Args:
        logits: `[V]` float64, `-inf` where masked.
        tilt_of: token ids, and `ln ref` of the whole vocabulary -> their `A`.
    """
    log_ref = (logits / (temperature or 1.0)).log_softmax(-1)
    if eta is None:
        return log_ref, log_ref, 0.0, None, False
    order = log_ref.argsort(descending=True)
    edge = log_ref[order[: candidates + 1]]
    ambiguous = candidates < len(order) and (edge[-2] - edge[-1]).item() < 1e-4
    chosen = [int(y) for y in order[:candidates] if log_ref[y] > float("-inf")]
    ambiguous |= any(abs(log_ref[y].exp().item() - min_prob) < 1e-5 for y in chosen)
    chosen = [y for y in chosen if log_ref[y].exp().item() >= min_prob]
    if len(chosen) <= 1:
        return log_ref, log_ref, 0.0, None, ambiguous
    a = torch.full_like(log_ref, float("nan"))
    a[chosen] = tilt_of(chosen, log_ref)
    inside = torch.zeros_like(log_ref, dtype=torch.bool)
    inside[chosen] = True
    if tail == "floor":
        a[~inside] = r_min / eta
    elif tail == "keep":
        a[~inside] = (log_ref[inside] + a[inside]).logsumexp(-1) - log_ref[inside].logsumexp(-1)
    else:
        a[~inside] = float("-inf")
    log_norm = (log_ref + a).logsumexp(-1)
    log_pi = log_ref + a - log_norm
    live = log_pi > -700
    kl = (log_pi[live].exp() * (log_pi[live] - log_ref[live])).sum().item()
    return log_ref, log_pi, kl, (eta * log_norm).item(), ambiguous


def limited(log_ref: Tensor, log_pi: Tensor, kl: float, budget: float) -> tuple[Tensor, float, float]:
    """`ln pi_a`, its KL and `a`, the largest in [0, 1] with which `pi_a ∝ ref · (pi/ref)^a` is within the budget."""
    if kl <= budget:
        return log_pi, kl, 1.0
    live = log_ref > -math.inf
    tilt = torch.where(live, log_pi - log_ref, 0.0)

    def at(a: float) -> tuple[Tensor, float]:
        if a == 0:
            return log_ref, 0.0
        scaled = torch.where(live, log_ref + a * tilt, -math.inf).log_softmax(-1)
        some = scaled > -700
        return scaled, (scaled[some].exp() * (scaled[some] - log_ref[some])).sum().item()

    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] <= budget else (low, middle)
    return *at(low), low


@torch.inference_mode()
def completion(
    reference_folder: Path,
    critic_folder: Path | None,
    prompt: list[int],
    tokens: list[int],
    *,
    eta: float | None,
    temperature: float = 1.0,
    candidates: int = 20,
    min_prob: float = DEFAULT_MIN_PROB,
    tail: str = "floor",
    method: str = "qsharp",
    bias: dict[int, float] | None = None,
    kl_total: float = math.inf,
    kl_token: float = math.inf,
) -> list[Expected]:
    """Every generated token's entry."""
    logits, hidden = (t[len(prompt) - 1 : -1] for t in reference_pass(reference_folder, prompt + tokens))
    for token, amount in (bias or {}).items():
        logits[:, token] += amount
    r_min = json.loads((critic_folder / "critic.json").read_text())["reward_range"][0] if critic_folder else 0.0
    entries = []
    native = critic_folder is not None and _critic(critic_folder)[1] is None
    walk = Walk(critic_folder) if critic_folder and not native else None
    spent, doubtful = 0.0, False  # whether what was spent is known
    for t, token in enumerate(tokens):
        history = prompt + tokens[:t]
        said: dict[int, Tensor] = {}

        def tilt_of(
            chosen: list[int],
            log_ref: Tensor,
            t: int = t,
            history: list[int] = history,
            said: dict[int, Tensor] = said,
        ) -> Tensor:
            assert critic_folder is not None
            assert eta is not None
            if walk is not None:
                outputs = walk.outputs(history, chosen)
            else:
                outputs = native_outputs(critic_folder, hidden[t], chosen, reference_folder, log_ref)
            said.update(zip(chosen, outputs, strict=True))
            return tilts(critic_folder, outputs, eta, method)

        log_ref, log_pi, kl, value, ambiguous = guided_policy(
            logits[t], temperature, tilt_of, r_min, eta, candidates, min_prob, tail
        )
        log_pi, kl, strength = limited(log_ref, log_pi, kl, min(kl_token, max(kl_total - spent, 0.0)))
        spent, doubtful = spent + kl, doubtful or (ambiguous and kl_total < math.inf)
        entries.append(
            Expected(
                token,
                kl,
                log_ref[token].item(),
                log_pi[token].item(),
                value,
                ambiguous or doubtful,
                log_pi.exp(),
                log_ref,
                strength,
                said or None,
            )
        )
    return entries
