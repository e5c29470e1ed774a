"""Features of rollouts are what a plain forward pass of each rollout says, however they were run, and are run once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import models
from trainer.training.data import merge_rollouts
from trainer.training.features.extract import ReferenceModel
from trainer.training.features.known import features
from trainer.training.features.passes import common_chain, cut, needed
from trainer.training.features.store import FeatureStore, as_keys
from trainer.training.prefix_tree import ancestors, visible
from trainer.training.rollouts import LabelledRollout, SamplingPolicy
from trainer.training.settings import TrainingError

CPU = torch.device("cpu")
LARGE = 10**9


def rollout(name: str, prompt: list[int], completion: list[int], first: int = 0) -> LabelledRollout:
    return LabelledRollout(
        name, np.array(prompt, np.int32), np.array(completion, np.int32), first, 1.0, SamplingPolicy(), "group"
    )


def world(prompts: int = 5, each: int = 6, shots: int = 7) -> list[LabelledRollout]:
    """Rollouts of up to 30 tokens after prompts that begin alike; they agree in their first tokens."""
    dice = np.random.default_rng(0)
    common = dice.integers(3, 90, shots).tolist()
    made = []
    for p in range(prompts):
        question = dice.integers(3, 90, 3).tolist()
        for k in range(each):
            completion = dice.integers(3, 5, dice.integers(1, 30)).tolist()
            made.append(rollout(f"{p}-{k}", common + question, completion, first=int(dice.integers(len(completion)))))
    return made


def apart(count: int = 25) -> list[LabelledRollout]:
    """Rollouts of 2 to 40 tokens that hardly share any."""
    dice = np.random.default_rng(1)
    made = []
    for i in range(count):
        prompt, completion = (dice.integers(3, 90, dice.integers(1, 21)).tolist() for _ in range(2))
        made.append(rollout(str(i), prompt, completion, first=int(dice.integers(len(completion)))))
    return made


def test_every_distinct_prefix_is_one_node() -> None:
    data = world()
    tree, labelled = merge_rollouts(data)
    prefixes = {tuple(r.token_ids[: n + 1].tolist()) for r in data for n in range(r.length)}
    assert len(tree) == len(prefixes)
    paths = [tuple(tree.tokens_N[[*ancestors(tree, n), n]].tolist()) for n in range(len(tree))]
    assert set(paths) == prefixes
    assert tree.depths_N.tolist() == [len(path) - 1 for path in paths]
    assert len(np.unique(as_keys(tree.keys_N))) == len(tree)
    for r, nodes in zip(data, labelled, strict=True):
        assert [paths[n] for n in nodes] == [
            tuple(r.token_ids[: len(r.prompt) + t + 1].tolist()) for t in range(r.first_valid, len(r.completion))
        ]
    # The digest is the prefix's own, whatever else is in the tree.
    alone, _ = merge_rollouts(data[3:4])
    known = {path: tree.keys_N[n].tobytes() for n, path in enumerate(paths)}
    for n in range(len(alone)):
        assert known[tuple(alone.tokens_N[: n + 1].tolist())] == alone.keys_N[n].tobytes()


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
def test_passes_run_every_node_once_after_its_ancestors(size: int) -> None:
    tree, labelled = merge_rollouts(world())
    read = np.unique(tree.parents_N[np.unique(np.concatenate(labelled))]).astype(np.int64)
    nodes = needed(tree, read)
    assert set(nodes) == {int(n) for r in read for n in [*ancestors(tree, int(r)), r]}
    chain = common_chain(tree, nodes)
    assert chain == 7  # what all prompts begin with
    new = []
    for one in cut(tree, nodes, chain, size):
        seen = visible(tree, one.nodes)
        for i, node in enumerate(one.nodes):
            above = [n for n in ancestors(tree, int(node)) if n not in nodes[:chain]]
            assert one.nodes[seen[i]].tolist() == [*above, node]
        new += one.nodes[one.old :].tolist()
    assert new == nodes[chain:].tolist()


def test_passes_end_where_nothing_has_to_be_run_again() -> None:
    """Trees of 80 nodes: a pass has at least one of them, and no part of another."""
    dice = np.random.default_rng()
    data = []
    for p in range(8):
        prompt = [p + 3, *dice.integers(3, 90, 29).tolist()]
        data += [rollout(f"{p}-{k}", prompt, [k, *dice.integers(3, 90, 9).tolist()]) for k in range(5)]
    tree, _ = merge_rollouts(data)
    size = int(dice.integers(80, 400))
    passes = list(cut(tree, np.arange(len(tree)), 0, size))
    assert [len(one.nodes) for one in passes[:-1]] == [size // 80 * 80] * (len(passes) - 1), size
    assert all(one.old == 0 for one in passes), size


def test_nothing_is_common_where_sequences_begin_differently() -> None:
    tree, _ = merge_rollouts([rollout("a", [5, 6], [7, 8]), rollout("b", [6, 6], [7, 8])])
    assert common_chain(tree, np.arange(len(tree))) == 0
    single, _ = merge_rollouts([rollout("a", [5, 6, 7], [8])])
    assert common_chain(single, np.arange(len(single))) == 3


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt", "mistral"])
@pytest.mark.parametrize(
    ("temperature", "data", "size"), [(1.0, world(), 16), (0.7, world(), 70), (1.0, apart(), 99), (0.7, apart(), 1)]
)
def test_features_are_those_of_plain_forward_passes(
    kind: str,
    temperature: float,
    data: list[LabelledRollout],
    size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model with a window shorter than the rollouts, too, which knows no trees."""
    monkeypatch.setattr("trainer.training.features.extract.PASS_NODES", {"cpu": size})
    folder = models.write_reference(tmp_path / "reference", kind)
    reference = ReferenceModel(folder, torch.float32, CPU, temperature)
    tree, labelled = merge_rollouts(data)
    nodes = np.unique(np.concatenate(labelled)).astype(np.int64)
    found = features(reference, FeatureStore(tmp_path / "f", reference.digest, found_width(folder), LARGE), tree, nodes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hidden = found.hidden(torch.arange(len(nodes))).float()
    for r, own in zip(data, labelled, strict=True):
        with torch.inference_mode():
            ids = torch.from_numpy(r.token_ids.astype(np.int64))[None]
            plain = model(input_ids=ids, output_hidden_states=True)
        log_probs = (plain.logits[0] / temperature).log_softmax(-1)
        at = np.searchsorted(nodes, own)
        places = np.arange(len(r.prompt) + r.first_valid, r.length)
        tokens = ids[0, places]
        assert found.tokens_M[at].tolist() == tokens.tolist()
        torch.testing.assert_close(found.log_ref_M[at], log_probs[places - 1, tokens], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(hidden[at], plain.hidden_states[-1][0, places - 1], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("data", "rows"), [(world(), False), (apart(), True)])
def test_what_shares_little_runs_as_rows(data: list[LabelledRollout], rows: bool, llama: Path, tmp_path: Path) -> None:
    reference = ReferenceModel(llama, torch.float32, CPU)
    shapes = []
    reference.model.register_forward_pre_hook(
        lambda _, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    tree, labelled = merge_rollouts(data)
    features(reference, FeatureStore(tmp_path, reference.digest, 64, LARGE), tree, nodes_of(labelled))
    assert (max(shape[0] for shape in shapes) > 1) == rows
    if rows:
        assert sum(map(np.prod, shapes)) < 1.1 * sum(r.length for r in data)


def found_width(folder: Path) -> int:
    width: int = AutoModelForCausalLM.from_pretrained(folder).config.hidden_size
    return width


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_reference(tmp_path_factory.mktemp("reference"), "llama")


def nodes_of(labelled: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(labelled)).astype(np.int64)


def test_what_is_known_is_not_run_again(llama: Path, tmp_path: Path) -> None:
    data = world()
    tree, labelled = merge_rollouts(data[:12])
    first = ReferenceModel(llama, torch.float32, CPU)
    before = features(first, FeatureStore(tmp_path, first.digest, 64, LARGE), tree, nodes_of(labelled))
    again = ReferenceModel(llama, torch.float32, CPU)
    store = FeatureStore(tmp_path, again.digest, 64, LARGE)
    after = features(again, store, tree, nodes_of(labelled))
    assert again._model is None  # never loaded
    everything = torch.arange(len(before))
    assert torch.equal(before.hidden(everything), after.hidden(everything))
    assert torch.equal(before.log_ref_M, after.log_ref_M)
    # More rollouts of the same prompts: only what is new.
    known = sum(len(shard.keys_E) for shard in store.shards)
    tree, labelled = merge_rollouts(data)
    features(again, store, tree, nodes_of(labelled))
    assert sum(len(shard.keys_E) for shard in store.shards) == len(nodes_of(labelled)) > known
    # Another precision and another temperature are other features.
    others = {ReferenceModel(llama, torch.bfloat16, CPU).digest, ReferenceModel(llama, torch.float32, CPU, 0.5).digest}
    assert len(others | {again.digest}) == 3


def test_the_folder_does_not_grow_beyond_its_bound(llama: Path, tmp_path: Path) -> None:
    data = world()
    tree, labelled = merge_rollouts(data)
    reference = ReferenceModel(llama, torch.float32, CPU)
    with pytest.raises(TrainingError, match="--features-gb"):
        features(reference, FeatureStore(tmp_path, reference.digest, 64, 1000), tree, nodes_of(labelled))
    assert not list(tmp_path.glob("*/*"))
    # What another run left makes room, the oldest first, and what this one reads stays.
    old = ReferenceModel(llama, torch.float32, CPU, 0.5)
    features(old, FeatureStore(tmp_path, old.digest, 64, LARGE), tree, nodes_of(labelled))
    held = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    found = features(reference, FeatureStore(tmp_path, reference.digest, 64, int(held * 1.5)), tree, nodes_of(labelled))
    assert not list((tmp_path / old.digest).glob("*"))
    assert found.hidden(torch.arange(len(found))).isfinite().all()


def test_a_shard_that_a_kill_left_half_written_is_none(llama: Path, tmp_path: Path) -> None:
    reference = ReferenceModel(llama, torch.float32, CPU)
    folder = tmp_path / reference.digest
    folder.mkdir()
    (folder / ".half.safetensors").write_bytes(b"nothing")
    (folder / "whole.hidden").write_bytes(b"its entries were not written yet")
    assert FeatureStore(tmp_path, reference.digest, 64, LARGE).shards == []
