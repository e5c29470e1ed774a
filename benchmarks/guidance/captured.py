"""The critic's step on a GPU: captured as a graph, with and without compiling it first.

`Decoder.score` alone, without a reference model; every row has `LENGTH` tokens behind it.
"""

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.guidance.pairs import Pair
from qsharp_core.critic.scoring.backbone import CachedBackbone
from qsharp_core.critic.scoring.decoder import Decoder
from qsharp_core.vllm_plugin.flash import flash

LENGTH, BLOCK_SIZE, STEPS = 290, 16, 20


@torch.inference_mode()
def measure(pair: Pair, rows: list[int], candidates: list[int]) -> list[dict[str, Any]]:
    """Seconds of each of `STEPS` steps, by the device's clock, per head, way and shape."""
    blocks = -(-LENGTH // BLOCK_SIZE)
    shapes = [(many, count) for many in rows for count in candidates]
    found = []
    with tqdm(total=2 * len(pair.critics) * len(shapes), desc=f"{pair.name}: captured steps", unit="shape") as bar:
        for head in pair.critics:
            backbone = CachedBackbone(pair.critic(head), max(rows) * blocks * BLOCK_SIZE, BLOCK_SIZE)
            for compiled in (True, False):
                decoder = Decoder(backbone.critic, backbone.pool, BLOCK_SIZE, blocks * BLOCK_SIZE, flash, compiled)
                decoder.capture(rows, candidates)
                for many, count in shapes:
                    seconds = _seconds(decoder, many, count, blocks)
                    shape = {"rows": many, "candidates": count, "compiled": compiled, "length": LENGTH}
                    found.append({"pair": pair.name, "head": head, **shape, "seconds": seconds})
                    bar.update()
    return found


def _seconds(decoder: Decoder, rows: int, candidates: int, blocks: int) -> list[float]:
    tables = [list(range(row * blocks, (row + 1) * blocks)) for row in range(rows)]
    with torch.device(decoder.device):
        last_R = torch.randint(decoder.critic.vocab, (rows,))
        ids_RK = torch.randint(decoder.critic.vocab, (rows, candidates))
    lengths = np.full(rows, LENGTH, dtype=np.int32)
    marks = []
    for _ in range(STEPS + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        decoder.score(last_R, ids_RK, lengths, tables)
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks[5:]]
