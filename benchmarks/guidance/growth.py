"""How a critic's step grows with prefix length, rows and candidates, and what its cache takes.

`PagedScorer.score` alone, without a reference model: each step, every row goes on with one of its candidates of the
step before, as in decoding. Each row has a prefix of its own.
"""

import time
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.guidance.pairs import Pair
from qsharp_core.critic.model import Critic
from qsharp_core.critic.scoring.backbone import CachedBackbone
from qsharp_core.critic.scoring.paged import PagedScorer

LENGTHS = (64, 128, 256, 512, 1024, 2048)
ROWS = (1, 2, 4, 8, 16, 32, 64)
CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
LENGTH, AT_ONCE, MOST = 256, 8, 8  # what stays when another grows


def measure(pair: Pair, steps: int, *, quick: bool = False) -> list[dict[str, Any]]:
    """Median, least and greatest time of a step, per point; of `steps` steps each.

    `ragged`: rows ask for 1 to `candidates`, evenly spread, as with `min_prob`; else all for `candidates`.
    """
    every = 3 if quick else 1
    points: list[dict[str, Any]] = [
        *({"by": "length", "length": n, "rows": AT_ONCE, "candidates": MOST} for n in LENGTHS[::every]),
        *({"by": "rows", "length": LENGTH, "rows": n, "candidates": MOST} for n in ROWS[::every]),
        *({"by": "candidates", "length": LENGTH, "rows": AT_ONCE, "candidates": n} for n in CANDIDATES[::every]),
        *(
            {"by": "candidates", "length": LENGTH, "rows": AT_ONCE, "candidates": n, "ragged": True}
            for n in CANDIDATES[::every]
        ),
    ]
    found = []
    with tqdm(total=len(pair.critics) * len(points), desc=f"{pair.name}: growth", unit="point") as bar:
        for head in pair.critics:
            critic = pair.critic(head)
            most = max(p["rows"] * (p["length"] + steps + 17) for p in points)
            scorer = PagedScorer(CachedBackbone(critic, most))
            for point in points:
                if point["length"] + steps + 1 <= scorer.capacity:
                    seconds = times(scorer, steps=steps, **{k: v for k, v in point.items() if k != "by"})
                    found.append({"pair": pair.name, "head": head, "ragged": False, **point, "seconds": seconds})
                bar.update()
    return found


def times(
    scorer: PagedScorer, *, length: int, rows: int, candidates: int, steps: int, ragged: bool = False
) -> list[float]:
    """Seconds of each of `steps` steps that begin `length` tokens into every row."""
    vocabulary = scorer.critic.vocab
    generator = torch.Generator().manual_seed(length + rows + candidates)
    histories = torch.randint(3, vocabulary, (rows, length - 1), generator=generator).tolist()
    counts_R = torch.linspace(1, candidates, rows).round() if ragged else torch.full((rows,), candidates)
    mask_RK = torch.arange(candidates) < counts_R[:, None]
    sequences = [scorer.open() for _ in range(rows)]
    chosen_R = torch.randint(3, vocabulary, (rows,), generator=generator)
    found = []
    for _ in range(steps + 2):
        for history, token in zip(histories, chosen_R.tolist(), strict=True):
            history.append(token)
        ids_RK = torch.randint(3, vocabulary, (rows, candidates), generator=generator)
        started = time.perf_counter()
        scorer.score(sequences, histories, ids_RK, mask_RK)
        found.append(time.perf_counter() - started)
        chosen_R = ids_RK[:, 0]  # the first is asked for in every row
    for sequence in sequences:
        scorer.close(sequence)
    return found[2:]  # the first runs the prefix, the second is the first that finds it


def pool(pair: Pair) -> dict[str, Any]:
    """What the keys and values of one token take, and how many tokens a GiB holds (V head)."""
    taken = token_bytes(pair.critic("V"))
    return {"pair": pair.name, "bytes_per_token": taken, "tokens_per_gib": 2**30 // taken}


def token_bytes(critic: Critic) -> int:
    """Keys and values of one token, all layers."""
    config = critic.backbone.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_layer = 2 * config.num_key_value_heads * width * next(critic.parameters()).element_size()
    return int(config.num_hidden_layers * per_layer)
