"""Cached scores equal full forward passes, whatever happens to the rows."""

import gc
import random
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsharp_core.critic import checkpoint
from qsharp_core.critic.scoring import attention, backbone, cpu, paged
from qsharp_core.critic.scoring.attention import _with_shared
from qsharp_core.critic.scoring.backbone import CachedBackbone
from qsharp_core.critic.scoring.cache import CachedSequence
from qsharp_core.critic.scoring.kv_pool import KVPool
from qsharp_core.critic.scoring.paged import PagedScorer
from qsharp_core.errors import CriticError
from tests.support import models, oracle

TOLERANCE = 1e-4
CRITICS = {
    "llama-V": {"kind": "llama"},
    "gpt2-V-categorical": {
        "kind": "gpt2",
        "distribution": {"kind": "categorical", "atoms": [-1.0, 0.0, 2.0]},
        "reward_range": (-1.0, 2.0),
    },
    "mistral-V-mlp": {"kind": "mistral", "mlp": 32},
    "qwen2-Q": {"kind": "qwen2", "head": "Q"},
    "opt-Q-categorical": {
        "kind": "opt",
        "head": "Q",
        "distribution": {"kind": "categorical", "atoms": [0.0, 0.5, 1.0]},
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("critics")
    return {name: models.write_critic(root / name, **options) for name, options in CRITICS.items()}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def aside() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def engine(
    folder: Path, tokens: int, block_size: int = 4, scratch: int = 1024, aside: Executor | None = None
) -> PagedScorer:
    return PagedScorer(CachedBackbone(checkpoint.load(folder)[1], tokens, block_size, scratch), aside)


class Driver:
    """Rows that grow, roll back, pause, end and begin, scored in random batches."""

    def __init__(self, engines: list[tuple[Path, PagedScorer]], rng: random.Random) -> None:
        self.engines, self.rng = engines, rng
        self.rows: list[tuple[Path, PagedScorer, CachedSequence, list[int]]] = []
        self.shared = [rng.randrange(models.VOCAB) for _ in range(14)]

    def begin(self) -> None:
        folder, critic = self.rng.choice(self.engines)
        prompt = [*self.shared[: self.rng.randrange(15)], self.rng.randrange(models.VOCAB)]
        if self.rng.random() < 0.4 and self.rows:  # another sample of a prompt that is already there
            prompt = list(self.rng.choice(self.rows)[3])
        prompt += [self.rng.randrange(models.VOCAB) for _ in range(self.rng.randrange(6))]
        self.rows.append((folder, critic, critic.open(), prompt))

    def end(self) -> None:
        if self.rows:
            _, critic, sequence, _ = self.rows.pop(self.rng.randrange(len(self.rows)))
            critic.close(sequence)

    def preempt(self) -> None:
        """A row comes back as a new one with the tokens it had, at another place."""
        if self.rows:
            folder, critic, sequence, history = self.rows.pop(self.rng.randrange(len(self.rows)))
            critic.close(sequence)
            self.rows.append((folder, critic, critic.open(), history))

    def roll_back(self) -> None:
        if self.rows:
            history = self.rng.choice(self.rows)[3]
            del history[max(1, len(history) - self.rng.randrange(1, 8)) :]

    def catch_up(self) -> None:
        """What then happens to the rows is not known: any may go on, pause, go back or end."""
        for _, critic in self.engines:
            rows = [row for row in self.rows if row[1] is critic and self.rng.random() < 0.8]
            critic.catch_up(
                [row[2] for row in rows], [len(row[3]) for row in rows], [partial(list, row[3]) for row in rows]
            )

    def step(self) -> None:
        scheduled = [row for row in self.rows if self.rng.random() < 0.8 and len(row[3]) < 60]
        for folder, critic in self.engines:
            rows = [row for row in scheduled if row[1] is critic]
            if not rows:
                continue
            most = self.rng.choice([2, 5, 5, 12])
            ids = torch.stack([torch.tensor(self.rng.sample(range(models.VOCAB), most)) for _ in rows])
            ranks = torch.arange(most)
            mask = torch.stack([ranks < self.rng.randrange(most + 1) for _ in rows])  # rows ask for many and for few
            mask &= torch.tensor([[self.rng.random() < 0.9 for _ in range(most)] for _ in rows])
            outputs = critic.score([row[2] for row in rows], [list(row[3]) for row in rows], ids, mask)
            for r, (_, _, _, history) in enumerate(rows):
                asked = mask[r].nonzero()[:, 0]
                wanted = (
                    oracle.critic_outputs(folder, history, ids[r][asked].tolist()) if len(asked) else outputs[r, :0]
                )
                torch.testing.assert_close(outputs[r][asked].double(), wanted.double(), atol=TOLERANCE, rtol=TOLERANCE)
                assert (outputs[r][~mask[r]] == 0).all()
                winner = int(ids[r, self.rng.randrange(most)])
                history.append(winner if self.rng.random() < 0.8 else self.rng.randrange(models.VOCAB))


@pytest.mark.parametrize("name", CRITICS)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    tokens=st.sampled_from([64, 120, 600]),
    scratch=st.sampled_from([12, 20, 48, 1024]),
    prefill=st.sampled_from([3, 20, 1024]),
    patch=st.sampled_from([0, 3, 16]),
    ahead=st.booleans(),
)
def test_cached_scores_equal_full_forward_passes(
    folders: dict[str, Path],
    aside: Executor,
    name: str,
    seed: int,
    tokens: int,
    scratch: int,
    prefill: int,
    patch: int,
    ahead: bool,
) -> None:
    """Whatever the limits: most of those that are drawn are passed all the time."""
    rng = random.Random(seed)
    other = rng.choice(sorted(folders))
    names = {name, other}
    engines = [(folders[n], engine(folders[n], tokens, 4, scratch, aside if ahead else None)) for n in sorted(names)]
    driver = Driver(engines, rng)
    moves = [driver.begin, driver.begin, driver.end, driver.preempt, driver.roll_back, *[driver.step] * 6]
    moves += [driver.catch_up] * 5
    with mock.patch.object(backbone, "PREFILL_TOKENS", prefill), mock.patch.object(paged, "PATCH_TOKENS", patch):
        for _ in range(25):
            rng.choice(moves)()
    while driver.rows:
        driver.end()
    for _, critic in driver.engines:
        assert critic.blocks.free == critic.blocks.total


def test_samples_of_one_prompt_share_its_blocks(folders: dict[str, Path]) -> None:
    critic = engine(folders["llama-V"], 400, block_size=4)
    prompt = list(range(20, 60))
    rows = [critic.open() for _ in range(8)]
    ids = torch.arange(5).repeat(8, 1)
    critic.score(rows, [[*prompt, i] for i in range(8)], ids, torch.ones_like(ids, dtype=torch.bool))
    assert critic.blocks.used == 10 + 8  # ten full blocks once, one of its own for each
    assert critic.take_counts() == (8 * 41, 7 * 40, 0)
    for row in rows:
        critic.close(row)
    assert critic.blocks.used == 0


@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_with_one_beginning_attend_to_it_together(
    folders: dict[str, Path], name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that all rows share are one product; a window's edge differs by row, so such a backbone shares none."""
    together: list[int] = []

    def spied(query: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        together.append(keys.shape[2])
        return _with_shared(query, keys, *rest)

    monkeypatch.setattr(attention, "_with_shared", spied)
    monkeypatch.setattr(cpu, "PACKED_ELEMENTS", 0 if packed else 1 << 40)
    critic = engine(folders[name], 400, block_size=4)
    linear = "gpt2" not in name  # whose layers are of a type of its own
    layers = critic.critic.backbone.modules()
    assert any(isinstance(layer.forward, cpu._Packed) for layer in layers) == (packed and linear)
    shared = list(range(20, 45))
    histories = [[*shared, 50], [*shared, 60, 61, 62, 63, 64], shared, [*shared, 50, 70]]
    rows = [critic.open() for _ in histories]
    ids = torch.arange(100, 120).view(4, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    for _ in range(3):
        outputs = critic.score(rows, histories, ids, mask)
        for r, history in enumerate(histories):
            wanted = oracle.critic_outputs(folders[name], history, ids[r][mask[r]].tolist())
            torch.testing.assert_close(outputs[r][mask[r]].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)
            history.append(int(ids[r, 0]))
    assert {*together} == (set() if "mistral" in name else {24})
    critic.close(rows.pop())
    other = critic.open()
    histories[-1] = [1, *histories[-1]]
    together.clear()
    outputs = critic.score([*rows, other], histories, ids, mask)
    wanted = oracle.critic_outputs(folders[name], histories[-1], ids[-1][mask[-1]].tolist())
    torch.testing.assert_close(outputs[-1][mask[-1]].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert not together


@pytest.mark.parametrize("rows", [1, 2, 6, 9])
def test_rows_that_do_not_fit_together_keep_nothing_that_another_row_overwrote(
    folders: dict[str, Path], rows: int
) -> None:
    """Rows by rows, so that a step's candidates take the scratch memory several times; every row goes on by one."""
    critic = engine(folders["llama-V"], 4096, block_size=16, scratch=64)
    rng = random.Random(rows)
    sequences = [critic.open() for _ in range(rows)]
    histories = [[rng.randrange(models.VOCAB) for _ in range(rng.randrange(3, 40))] for _ in range(rows)]
    mask = torch.ones(rows, 4, dtype=torch.bool)
    for _ in range(6):
        ids = torch.stack([torch.tensor(rng.sample(range(models.VOCAB), 4)) for _ in range(rows)])
        outputs = critic.score(sequences, histories, ids, mask)
        for r, history in enumerate(histories):
            wanted = oracle.critic_outputs(folders["llama-V"], history, ids[r].tolist())
            torch.testing.assert_close(outputs[r].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)
            history.append(int(ids[r, rng.randrange(4)]))
    assert critic.take_counts().splits == 6 * (-(-rows // 4) - 1)  # 64 slots are four blocks, and a row takes one


def test_a_row_takes_the_memory_that_it_asks_for(folders: dict[str, Path]) -> None:
    """One that asks for 64 candidates does not make the others, which ask for two, run apart."""
    critic = engine(folders["llama-V"], 4096, block_size=4, scratch=64 + 7 * 4)
    sequences, histories = [critic.open() for _ in range(8)], [[i, i + 1] for i in range(8)]
    ids = torch.arange(64).repeat(8, 1)
    mask = torch.zeros(8, 64, dtype=torch.bool)
    mask[:, :2], mask[5] = True, True
    outputs = critic.score(sequences, histories, ids, mask)
    assert critic.take_counts().splits == 0
    for r, history in enumerate(histories):
        wanted = oracle.critic_outputs(folders["llama-V"], history, ids[r][mask[r]].tolist())
        torch.testing.assert_close(outputs[r][mask[r]].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    mask[4] = True
    critic.score(sequences, histories, ids, mask)
    assert critic.take_counts().splits == 1


@pytest.mark.parametrize("name", CRITICS)
def test_the_oracles_walk_is_its_full_forward_passes(folders: dict[str, Path], name: str) -> None:
    """Past the window's edge, too."""
    walk, history = oracle.Walk(folders[name]), list(range(30, 50))
    for step in range(20):
        candidates = [step, 100 + step, 5]
        wanted = oracle.critic_outputs(folders[name], history, candidates)
        torch.testing.assert_close(walk.outputs(history, candidates), wanted, atol=1e-9, rtol=1e-9)
        history += [candidates[step % 3]] * (1 + step % 2)


@pytest.mark.parametrize("name", CRITICS)
def test_the_uncached_pass_is_the_definition(folders: dict[str, Path], name: str) -> None:
    critic = engine(folders[name], 200)
    history, candidates = list(range(30, 70)), [5, 6, 90]
    wanted = oracle.critic_outputs(folders[name], history, candidates)
    torch.testing.assert_close(
        critic.score_uncached(history, candidates).double(), wanted, atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize("name", CRITICS)
def test_a_row_that_is_not_finite_spoils_no_other_row(folders: dict[str, Path], name: str) -> None:
    critic = engine(folders[name], 64)
    bad = 7
    with torch.inference_mode():
        critic.critic.backbone.get_input_embeddings().weight[bad] = float("nan")
    ids, mask = torch.tensor([[5, 6], [5, 6]]), torch.ones(2, 2, dtype=torch.bool)
    spoilt, fine = critic.open(), critic.open()
    histories = [[bad, *range(53)], [40, 41]]
    for _ in range(2):
        outputs = critic.score([spoilt, fine], histories, ids, mask)
        assert not outputs[0].isfinite().any()
        wanted = oracle.critic_outputs(folders[name], histories[1], [5, 6])
        torch.testing.assert_close(outputs[1].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)
        histories = [[*history, 5] for history in histories]
    assert 0 in spoilt.blocks  # a block like any other: no table is padded with it
    critic.discard(spoilt)
    critic.close(spoilt)
    rows = [critic.open() for _ in range(15)]  # they get every block that it had
    histories = [[40 + i, 41, 42] for i in range(15)]
    outputs = critic.score(rows, histories, ids[:1].repeat(15, 1), mask[:1].repeat(15, 1))
    for r, history in enumerate(histories):
        wanted = oracle.critic_outputs(folders[name], history, [5, 6])
        torch.testing.assert_close(outputs[r].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_cache_that_is_distrusted_is_made_again(folders: dict[str, Path]) -> None:
    critic = engine(folders["llama-V"], 200)
    row, history = critic.open(), list(range(30, 50))
    ids, mask = torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool)
    critic.score([row], [history], ids, mask)
    critic.pool.values[0][row.blocks[0] * 4 + 2] += 1.0  # of the third token, in a block that is published
    wanted = oracle.critic_outputs(folders["llama-V"], history, [5, 6])
    assert (critic.score([row], [history], ids, mask)[0].double() - wanted).abs().max() > 10 * TOLERANCE
    critic.distrust()
    for sequence in (row, critic.open()):
        outputs = critic.score([sequence], [history], ids, mask)
        torch.testing.assert_close(outputs[0].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_candidate_of_other_tokens_is_not_taken_for_the_chosen_one(folders: dict[str, Path]) -> None:
    """A row goes back and on by tokens that another row has run, to the length it had: all shared, nothing missing."""
    critic = engine(folders["llama-V"], 400, block_size=4)
    first, second = list(range(20, 28)), list(range(40, 48))
    ids, mask = torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool)
    row, other = critic.open(), critic.open()
    critic.score([other], [second], ids, mask)
    critic.score([row], [first], ids, mask)
    outputs = critic.score([row], [[*second, 6]], ids, mask)
    wanted = oracle.critic_outputs(folders["llama-V"], [*second, 6], [5, 6])
    torch.testing.assert_close(outputs[0].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


@contextmanager
def broken(critic: PagedScorer) -> Iterator[None]:
    """Its passes fail."""

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    hook = critic.critic.backbone.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def test_a_failing_pass_leaves_nothing_wrong_behind(folders: dict[str, Path]) -> None:
    critic = engine(folders["llama-V"], 200)
    row, history = critic.open(), list(range(9))
    ids, mask = torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool)
    with broken(critic), pytest.raises(RuntimeError, match="broken"):
        critic.score([row], [history], ids, mask)
    outputs = critic.score([row], [history], ids, mask)
    wanted = oracle.critic_outputs(folders["llama-V"], history, [5, 6])
    torch.testing.assert_close(outputs[0].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama-V", "qwen2-Q"])
def test_rows_that_were_caught_up_have_nothing_left_but_their_candidates(
    folders: dict[str, Path], aside: Executor, name: str
) -> None:
    critic = engine(folders[name], 200, aside=aside)
    ran: list[int] = []
    critic.critic.backbone.register_forward_pre_hook(
        lambda *given: ran.append(given[2]["input_ids"].numel()), with_kwargs=True
    )
    rows, histories = [critic.open(), critic.open()], [list(range(17)), list(range(40, 60))]
    ids, mask = torch.tensor([[5, 6, 7], [1, 2, 3]]), torch.ones(2, 3, dtype=torch.bool)
    head_alone = name.endswith("Q")
    for aside_ran, missing in ((37, 0), (2 if head_alone else 0, 2)):  # then a token each that was no candidate
        critic.catch_up(rows, [len(history) for history in histories], [partial(list, h) for h in histories])
        critic.wait()
        assert sum(ran) == aside_ran
        outputs = critic.score(rows, histories, ids, mask)
        assert sum(ran) == (aside_ran if head_alone else aside_ran + missing + 6)
        for r, history in enumerate(histories):
            wanted = oracle.critic_outputs(folders[name], history, ids[r].tolist())
            torch.testing.assert_close(outputs[r].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)
        ran.clear()
        histories = [[*history, 8] for history in histories]


def test_a_pass_that_fails_aside_fails_whoever_asks_for_its_scores(folders: dict[str, Path], aside: Executor) -> None:
    critic = engine(folders["qwen2-Q"], 200, aside=aside)
    row, history = critic.open(), list(range(9))
    ids, mask = torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool)
    with broken(critic):
        critic.catch_up([row], [len(history)], [lambda: history])
        with pytest.raises(RuntimeError, match="broken"):
            critic.score([row], [history], ids, mask)
        critic.catch_up([row], [len(history)], [lambda: history])
        critic.wait()
    outputs = critic.score([row], [history], ids, mask)
    wanted = oracle.critic_outputs(folders["qwen2-Q"], history, [5, 6])
    torch.testing.assert_close(outputs[0].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_plain_scores_are_the_critics_forward(folders: dict[str, Path]) -> None:
    for name in ("llama-V", "qwen2-Q"):
        tokens = list(range(30, 50))
        got = engine(folders[name], 200).score_plain(tokens)
        wanted = oracle.critic_outputs(folders[name], tokens[:-1], tokens[-1:])
        torch.testing.assert_close(got[-1:].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_backbone_with_attention_of_its_own_is_refused() -> None:
    from transformers import AutoModel, BloomConfig, Gemma2Config

    from qsharp_core.critic.model import Critic, Head, HeadShape
    from qsharp_core.returns import Bernoulli

    gemma = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    for config in (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2), gemma):
        critic = Critic(AutoModel.from_config(config), Head(HeadShape("V", 32, 1, 64)), Bernoulli()).eval()
        with pytest.raises(CriticError, match=r"cannot|capping"):
            PagedScorer(CachedBackbone(critic, 100))


def test_an_engine_that_is_dropped_gives_its_memory_back(folders: dict[str, Path]) -> None:
    critic = engine(folders["llama-V"], 4096)
    watch = weakref.finalize(critic.pool.keys[0].untyped_storage(), int), weakref.ref(critic.critic.backbone)
    del critic
    gc.collect()
    assert not watch[0].alive
    assert watch[1]() is None


def test_a_pool_whose_keys_and_values_differ_in_width_moves_all_of_them() -> None:
    widths = [(torch.Size((2, 4)), torch.Size((2, 3))), (torch.Size((2, 4)), torch.Size((2, 4)))]
    pool = KVPool.zeros(6, widths, torch.zeros(1, dtype=torch.float64))
    for layer, tensor in enumerate((*pool.keys, *pool.values)):
        tensor[1], tensor[2] = layer + 1, -layer - 1
    pool.move(torch.tensor([1, 2]), torch.tensor([5, 0]))
    assert [tuple(keys.shape[1:]) for keys in pool.keys] == [(2, 4), (2, 4)]
    assert [tuple(values.shape[1:]) for values in pool.values] == [(2, 3), (2, 4)]
    for layer, tensor in enumerate((*pool.keys, *pool.values)):
        assert tensor.dtype == torch.float64
        assert (tensor[5] == layer + 1).all()
        assert (tensor[0] == -layer - 1).all()
        assert not tensor[3:5].any()
