"""Peer: the same guidance as a plain vLLM logits processor, with a dense cache per slot and two passes a step.

What one writes first: keys and values in one tensor `[slots, heads, longest, width]` per layer; each step the sampled
tokens are run and stored, then the candidates as `rows x candidates` sequences over copies of their rows' caches. Rows
are looked after one by one, in Python. Nothing is shared between requests.

Shapes: R rows, K candidates, M new tokens of a row, L longest prefix, G key heads, D head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from benchmarks.guidance import ours
from benchmarks.guidance.ours import Ask
from benchmarks.guidance.pairs import Pair
from benchmarks.guidance.two_pass import tilted
from qsharp_core.critic import checkpoint
from qsharp_core.critic.fetching import local_folder
from qsharp_core.critic.model import Critic
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.vllm_plugin.settings import EngineSettings, parse_critic

PROCESSOR = "benchmarks.guidance.peer_dense:DenseProcessor"


def seconds(llm: Any, pair: Pair, ask: Ask, seed: int) -> float:
    """Wall time of one wave's decoding: this critic runs every prompt anew."""
    return ours.seconds_less_first(llm, pair, ask, seed)


@dataclass(eq=False)
class _Request:
    """A guided request: `output` is vLLM's own list, which grows; the first `stored` tokens are in its slot."""

    eta: float
    candidates: int
    prompt: list[int]
    output: list[int]
    slot: int
    stored: int = 0


class DenseProcessor(LogitsProcessor):
    """See `vllm.v1.sample.logits_processor.interface`. Guides with the first V critic, at temperature 1."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        paths = [local_folder(parse_critic(argument)[1]) for argument in EngineSettings.of(vllm_config).critics]
        path = next(path for path in paths if checkpoint.read_card(path).head == "V")
        dtype, reference = vllm_config.model_config.dtype, vllm_config.model_config.model
        self.critic: Critic = checkpoint.load(path, dtype=dtype, reference=reference)[1]
        self.critic.backbone.set_attn_implementation("sdpa")
        slots, longest = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len
        config = self.critic.backbone.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, config.num_key_value_heads, longest, width)
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.free = list(range(slots))
        self.rows: dict[int, _Request] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._leave(index)
        for index, params, prompt, output in batch_update.added:
            self._leave(index)
            asked = GuidanceParams.from_extra_args(params.extra_args)
            if asked is not None and asked.eta is not None:
                self.rows[index] = _Request(asked.eta, asked.candidates, prompt or [], output, self.free.pop())
        for source, target, direction in batch_update.moved:
            moved, other = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = other
            elif other is not None:
                self.free.append(other.slot)

    @torch.inference_mode()
    def apply(self, logits: Tensor) -> Tensor:
        if not self.rows:
            return logits
        index = torch.tensor(sorted(self.rows))
        requests = [self.rows[i] for i in index.tolist()]
        self._store_missing(requests)
        rows_RV = logits[index]
        ids_RK = rows_RV.topk(max(request.candidates for request in requests)).indices
        outputs = self._score(requests, ids_RK)
        # A row that asks for fewer candidates than another drops what it did not ask for.
        eta_R = torch.tensor([request.eta for request in requests], dtype=torch.float64)
        guided_RV = tilted(rows_RV, ids_RK, outputs, self.critic.distribution, eta_R)
        low, high = self.critic.distribution.reward_range
        for r, request in enumerate(requests):
            rest = ids_RK[r, request.candidates :]
            guided_RV[r, rest] = rows_RV[r, rest] + (low - high) / request.eta
        logits[index] = guided_RV
        return logits

    def _leave(self, index: int) -> None:
        request = self.rows.pop(index, None)
        if request is not None:
            self.free.append(request.slot)

    def _store_missing(self, requests: list[_Request]) -> None:
        """First pass: tokens that the slots lack, the sampled ones of all rows together, prompts one by one."""
        sampled: list[_Request] = []
        for request in requests:
            missing = (request.prompt + request.output)[request.stored :]
            if len(missing) == 1:
                sampled.append(request)
            elif missing:
                self._store([request], torch.tensor([missing]))
        if sampled:
            self._store(sampled, torch.tensor([[(r.prompt + r.output)[-1]] for r in sampled]))

    def _store(self, requests: list[_Request], ids_RM: Tensor) -> None:
        slots = torch.tensor([request.slot for request in requests])
        position_RM = torch.tensor([request.stored for request in requests])[:, None] + torch.arange(ids_RM.shape[1])
        longest = int(position_RM.max()) + 1
        seen_R1ML = torch.arange(longest) <= position_RM[:, None, :, None]
        self._forward(ids_RM, seen_R1ML, position_RM, _Storing(self, slots, position_RM, longest))
        for request in requests:
            request.stored += ids_RM.shape[1]

    def _score(self, requests: list[_Request], ids_RK: Tensor) -> Tensor:
        """Second pass: `[R, K, n_out]`."""
        most = ids_RK.shape[1]
        slots = torch.tensor([request.slot for request in requests])
        length_R = torch.tensor([request.stored for request in requests]).repeat_interleave(most)
        longest = int(length_R.max())
        at_L = torch.arange(longest + 1)  # the last is the candidate itself
        seen = ((at_L < length_R[:, None]) | (at_L == longest))[:, None, None]
        hidden = self._forward(ids_RK.reshape(-1, 1), seen, length_R[:, None], _Copying(self, slots, longest, most))
        return self.critic.head.at_tokens(hidden[:, -1]).unflatten(0, ids_RK.shape)

    def _forward(self, ids: Tensor, seen: Tensor, positions: Tensor, cache: Any) -> Tensor:
        return self.critic.backbone(
            input_ids=ids.clamp(max=self.critic.vocab - 1), attention_mask=seen, position_ids=positions,
            past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip


@dataclass
class _Storing:
    """What the layers of the first pass see as their cache: it writes new keys and values, and gathers the rows'."""

    of: DenseProcessor
    slots: Tensor
    position_RM: Tensor
    longest: int

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        made = []
        for store, new in ((self.of.keys[layer], keys), (self.of.values[layer], values)):
            store[self.slots[:, None], :, self.position_RM] = new.transpose(1, 2)
            made.append(store[self.slots, :, : self.longest])
        return made[0], made[1]


@dataclass
class _Copying:
    """The second pass's: each row's keys and values once per candidate, and the candidate's own."""

    of: DenseProcessor
    slots: Tensor
    longest: int
    most: int

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        made = []
        for store, new in ((self.of.keys[layer], keys), (self.of.values[layer], values)):
            prefix = store[self.slots, :, : self.longest].repeat_interleave(self.most, dim=0)
            made.append(torch.cat([prefix, new], dim=2))
        return made[0], made[1]
