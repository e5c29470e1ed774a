"""How far sound cached scores are from the plain pass that audits make, in bfloat16 and float32 (docs/decisions.md).

    python -m benchmarks.audit_error

The default model's separate critic scores 32 rows of random tokens together, step by step as they grow.
"""

import random
import statistics

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from qsharp_core.critic import checkpoint
from qsharp_core.critic.scoring.backbone import CachedBackbone
from qsharp_core.critic.scoring.paged import PagedScorer
from qsharp_core.vllm_plugin.audit import TOLERANCE
from server.presets.known import PRESETS, SEPARATE

ROWS, CANDIDATES, STEPS = 32, 20, 10


def errors(dtype: torch.dtype) -> list[float]:
    """Of every row of every step, as `vllm_plugin.audit` defines them."""
    preset = PRESETS[SEPARATE]
    _, critic = checkpoint.load(preset.critic_folder, dtype=dtype, reference=preset.model())
    scorer = PagedScorer(CachedBackbone(critic, 16_384))
    rng = random.Random(0)
    sequences = [scorer.open() for _ in range(ROWS)]
    histories = [rng.choices(range(critic.vocab), k=rng.randrange(5, 300)) for _ in range(ROWS)]
    mask = torch.ones(ROWS, CANDIDATES, dtype=torch.bool)
    found = []
    for _ in tqdm(range(STEPS), desc=str(dtype), unit="step"):
        ids = torch.tensor([rng.sample(range(critic.vocab), CANDIDATES) for _ in range(ROWS)])
        outputs = scorer.score(sequences, histories, ids, mask).double()
        for history, own, cached in zip(histories, ids.tolist(), outputs, strict=True):
            plain = scorer.score_uncached(history, own).double()
            found.append(((cached - plain).abs().max() / plain.abs().max().clamp(min=1.0)).item())
            history.append(rng.choice(own))
    return found


def main() -> None:
    torch.set_num_threads(1)
    table = Table("dtype", "rows", "median", "99 %", "largest", "tolerance")
    for dtype in (torch.bfloat16, torch.float32):
        found = errors(dtype)
        high = statistics.quantiles(found, n=100)[-1]
        shown = [f"{value:.2g}" for value in (statistics.median(found), high, max(found), TOLERANCE[dtype])]
        table.add_row(str(dtype), str(len(found)), *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
