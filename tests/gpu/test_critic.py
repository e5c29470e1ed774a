"""On an NVIDIA GPU: vLLM's attention kernel and captured steps give the scores of full forward passes."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qsharp_core.critic import checkpoint, native_checkpoint
from qsharp_core.critic.scoring.build import build_scorer
from qsharp_core.critic.scoring.fixed import FixedShapeScorer
from qsharp_core.critic.scoring.prefix_attention import gathered
from qsharp_core.vllm_plugin.flash import flash
from tests.core.critic.test_engine import CRITICS
from tests.support import models, oracle

ON_A_GPU = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    # Of torch's own: that a debugging mode is young, and that a less precise mode would be faster.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode", "ignore:TensorFloat32 tensor cores"),
]
pytestmark = ON_A_GPU

BLOCK_SIZE = 16
# Of bfloat16 against float64, relative to the size of the scores; a cache that is off by one token gives 0.5 and more.
NOISE = 0.05


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("heads", "groups", "width"), [(9, 3, 64), (32, 8, 64), (32, 8, 128), (2, 1, 32), (4, 4, 256)])
@pytest.mark.parametrize(("rows", "many"), [(1, 1), (5, 9), (32, 21)])
def test_the_kernel_is_its_definition(heads: int, groups: int, width: int, rows: int, many: int) -> None:
    generator = torch.Generator("cuda").manual_seed(rows * heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    blocks = 8
    keys, values = (normal(rows * blocks * BLOCK_SIZE, groups, width) for _ in range(2))
    table_RB = torch.randperm(rows * blocks, device="cuda", generator=generator).view(rows, blocks).int()
    edges = torch.tensor([1, BLOCK_SIZE, BLOCK_SIZE + 1, blocks * BLOCK_SIZE - 1, blocks * BLOCK_SIZE])
    length_R = edges.repeat(rows)[:rows].int().cuda()
    query = normal(rows, many, heads, width)
    got, got_lse = flash(query, keys, values, table_RB, length_R, BLOCK_SIZE, width**-0.5)
    wanted, wanted_lse = gathered(
        query.double(), keys.double(), values.double(), table_RB, length_R, BLOCK_SIZE, width**-0.5
    )
    torch.testing.assert_close(got.double(), wanted, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(got_lse, wanted_lse.float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in CRITICS if name != "mistral-V-mlp"])
@pytest.mark.parametrize("graphs", [((), ()), ((1, 4, 8), (5, 9))])
def test_steps_in_fixed_shapes(tmp_path: Path, name: str, graphs: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Rows come, go and pause; with graphs they are padded to the next size in both directions."""
    rng = random.Random(name)
    folder = models.write_critic(tmp_path / name, **CRITICS[name])  # type: ignore[arg-type]
    critic = checkpoint.load(folder, dtype=torch.bfloat16, device=torch.device("cuda"))[1]
    engine = build_scorer(critic, 4096, BLOCK_SIZE, kernel=flash, graphs=graphs)
    assert isinstance(engine, FixedShapeScorer)
    assert (engine.decoder._fused is not engine.decoder._plain) == bool(graphs[0])  # compiled
    assert len(engine.decoder._graphs) == len(graphs[0]) * len(graphs[1])
    shared = [rng.randrange(models.VOCAB) for _ in range(40)]
    rows = [
        (engine.open(), [*shared, *(rng.randrange(models.VOCAB) for _ in range(rng.randrange(20)))]) for _ in "123456"
    ]
    got, wanted = [], []
    for step in range(24):
        if step % 7 == 6:
            sequence, history = rows.pop(0)
            engine.close(sequence)
            rows.append((engine.open(), history))
        running = [row for row in rows if rng.random() < 0.9] or rows[:1]
        candidates = rng.choice([3, 5, 9, 12])
        ids = torch.tensor([rng.sample(range(models.VOCAB), candidates) for _ in running])
        last = torch.tensor([history[-1] for _, history in running], device="cuda")
        lengths = [len(history) for _, history in running]
        sequences = [sequence for sequence, _ in running]

        def read(i: int, running: list = running) -> list[int]:
            return list(running[i][1])

        outputs = engine.score(sequences, lengths, last, ids.cuda(), read)
        got.append(outputs.double().cpu().flatten())
        wanted.append(
            torch.cat([oracle.critic_outputs(folder, h, ids[r].tolist()).flatten() for r, (_, h) in enumerate(running)])
        )
        error = (got[-1] - wanted[-1]).norm() / wanted[-1].norm()
        assert error < 2 * NOISE, (step, error)
        for _, history in running:
            history.append(rng.randrange(models.VOCAB))
    every, oracles = torch.cat(got), torch.cat(wanted)
    assert (every - oracles).norm() / oracles.norm() < NOISE
    for sequence, _ in rows:
        engine.close(sequence)
    assert engine.blocks.free == engine.blocks.total


def test_a_step_of_running_rows_does_not_wait_for_the_device(tmp_path: Path) -> None:
    folder = models.write_critic(tmp_path / "critic", kind="qwen2")
    critic = checkpoint.load(folder, dtype=torch.bfloat16, device=torch.device("cuda"))[1]
    engine = build_scorer(critic, 4096, BLOCK_SIZE, kernel=flash, graphs=((4,), (8,)))
    assert isinstance(engine, FixedShapeScorer)
    sequences = [engine.open() for _ in range(3)]
    ids = torch.randint(models.VOCAB, (3, 8), device="cuda")
    for step in range(40):  # over the edges of blocks
        last = torch.full((3,), 5, device="cuda")
        lengths = [20 + step] * 3
        if step == 0:
            engine.score(sequences, lengths, last, ids, lambda _: [5] * 20)
            continue
        with no_waiting():
            engine.score(sequences, lengths, last, ids, lambda _: pytest.fail("nothing is to be read"))


def test_a_native_critic_does_not_wait_and_gives_what_its_head_gives(tmp_path: Path) -> None:
    reference = models.write_reference(tmp_path / "reference")
    folder = models.write_native_critic(tmp_path / "critic", reference)
    _, head = native_checkpoint.load_head(folder, reference)
    device = torch.device("cuda")
    embeddings = checkpoint.input_embeddings(reference)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, head.shape.hidden, generator=generator).bfloat16()
    ids = torch.randint(models.VOCAB, (9, 20), generator=generator)
    log_ref = -8 * torch.rand(9, 20, generator=generator, dtype=torch.float64)
    wanted = head.double()(hidden[:, None].double(), embeddings[ids].double(), log_ref)
    given = hidden.to(device), ids.to(device), log_ref.to(device)
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, NOISE)):
        _, critic = native_checkpoint.load(folder, reference, dtype=dtype, device=device)
        critic.score(*given)  # the first call sets up the libraries
        with no_waiting():
            got = critic.score(*given)
        assert (got.double().cpu() - wanted).norm() / wanted.norm() < close
