"""Whether a head that learned from transformers' hidden states is asked about the same ones by vLLM.

    python -m benchmarks.hidden_states --critic critics/sums/1 --data rollouts.parquet

vLLM runs rollouts as prompts, all positions at once, and decodes answers of its own, a token a step; transformers runs
the same tokens in the same precision and in float32. What is said of each pair: how far hidden states are apart at the
positions where a critic would be asked, and what that does to a native critic's scores of the eight likeliest tokens
(ids and log-probabilities are transformers' for both). How far transformers' own two precisions are apart is what the
others are to be compared with.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from qsharp_core.critic.native_checkpoint import load
from qsharp_core.critic.scoring.native import NativeScorer
from server.presets.known import DEFAULT, PRESETS
from trainer.training.data import read

CANDIDATES = 8
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Engine:
    """vLLM, with a tap where logits are computed.

    Args:
        folder: the model's.
        dtype: a name that vLLM knows.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import vllm

        self._vllm = vllm
        self._llm: Any = vllm.LLM(str(folder), dtype=dtype, enforce_eager=True, max_model_len=2048, max_num_seqs=1)
        self._seen: list[Tensor] = []
        model = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        compute = model.compute_logits

        def tapped(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._seen.append(hidden.detach().float().clone())
            return compute(hidden, *args, **kwargs)

        model.compute_logits = tapped

    def read(self, ids: Sequence[int]) -> Tensor:
        """Hidden states after every token of a prompt, `[tokens, D]`."""
        self._run(ids, max_tokens=1, prompt_logprobs=0)
        last, others = self._seen  # the position that is sampled from comes first
        return torch.cat([others, last])

    def decode(self, ids: Sequence[int], tokens: int) -> tuple[list[int], Tensor]:
        """An answer of `tokens` tokens, and the hidden states before each of them, `[tokens, D]`."""
        made = self._run(ids, max_tokens=tokens, ignore_eos=True)
        return made, torch.cat(self._seen)

    def _run(self, ids: Sequence[int], **sampling: Any) -> list[int]:
        self._seen.clear()
        params = self._vllm.SamplingParams(temperature=0.0, **sampling)
        (answer,) = self._llm.generate({"prompt_token_ids": list(ids)}, params, use_tqdm=False)
        return list(answer.outputs[0].token_ids)


class Plain:
    """transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states and log-probabilities after every token, `[tokens, D]` and `[tokens, V]`."""
        found = self._model(torch.tensor([list(ids)]), output_hidden_states=True)
        return found.hidden_states[-1][0].float(), found.logits[0].float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--critic", type=Path, required=True, help="a native critic's folder")
    parser.add_argument("--data", type=Path, required=True, help="Parquet file of rollouts")
    parser.add_argument("--model", type=Path, help="its reference's folder (default: the default model)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of both engines (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=40, help="rollouts, and as many decodes (%(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="of each decode (%(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    folder = args.model or PRESETS[DEFAULT].model()
    _, critic = load(args.critic, folder)
    rollouts = read([args.data]).rollouts
    picked = np.random.default_rng(0).choice(len(rollouts), min(args.sequences, len(rollouts)), replace=False)
    engine, plain, exact = Engine(folder, args.dtype), Plain(folder, DTYPES[args.dtype]), Plain(folder, torch.float32)
    prompts, decodes, precisions = (Pair() for _ in range(3))
    for i in picked:
        r = rollouts[i]
        start, ids = len(r.prompt) - 1, r.token_ids.tolist()
        states, log_probs = plain.read(ids)
        prompts.add(critic, engine.read(ids)[start:-1], states[start:-1], log_probs[start:-1])
        precisions.add(critic, exact.read(ids)[0][start:-1], states[start:-1], log_probs[start:-1])
        made, decoded = engine.decode(r.prompt.tolist(), args.tokens)
        states, log_probs = plain.read([*r.prompt.tolist(), *made])
        decodes.add(critic, decoded, states[start:-1], log_probs[start:-1])
    table = Table("compared with transformers", "cosine, least", "cosine, median", "score off: median", "99 %", "n")
    for name, pair in ((f"vLLM, {args.dtype}, as a prompt", prompts), (f"vLLM, {args.dtype}, decoded", decodes),
                       ("transformers, float32", precisions)):  # fmt: skip
        table.add_row(name, *pair.row())
    Console(width=140).print(table)
    spread = torch.cat(prompts.spreads)
    print(f"scores of a position's {CANDIDATES} candidates spread by {spread.median():.3f} (median standard deviation)")


class Pair:
    """Two engines' hidden states of the same positions, and a critic's scores of these."""

    def __init__(self) -> None:
        self.cosines: list[Tensor] = []
        self.differences: list[Tensor] = []
        self.spreads: list[Tensor] = []

    def add(self, critic: NativeScorer, ours: Tensor, theirs: Tensor, log_probs: Tensor) -> None:
        """Hidden states `[n, D]` of both, and log-probabilities `[n, V]` of the candidates."""
        top = log_probs.topk(CANDIDATES)
        a, b = (critic.score(states, top.indices, top.values)[..., 0] for states in (ours, theirs))
        self.cosines.append(F.cosine_similarity(ours, theirs))
        self.differences.append((a - b).abs().flatten())
        self.spreads.append(b.std(dim=1))

    def row(self) -> list[str]:
        """For the table."""
        cosines, differences = torch.cat(self.cosines), torch.cat(self.differences)
        return [
            f"{cosines.min():.5f}", f"{cosines.median():.5f}", f"{differences.median():.4f}",
            f"{differences.quantile(0.99):.4f}", str(len(cosines)),
        ]  # fmt: skip


if __name__ == "__main__":
    main()
