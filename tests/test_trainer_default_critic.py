"""The default critic's data: trees over a shared prefix are the rows that they stand for."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, LlamaConfig

from trainer.default_critic.branching import CANDIDATES, draw_branches
from trainer.default_critic.prefix import ATTENTION, common_prefix, prefix_keys_values
from trainer.default_critic.rollouts import Rollout, read_rollouts, to_lines
from trainer.default_critic.trees import Tree, build_tree, inputs, pruned, thinned

PREFIX = [3, 9, 4, 11]
QUESTION = [7, 8, 20, 21]


def rollout(completion: list[int], reward: float, given: int = 0) -> Rollout:
    return Rollout((1, 2, 3), PREFIX + QUESTION, completion, "", reward, given)


ROLLOUTS = [
    rollout([1, 2, 3], 1.0),
    rollout([1, 2, 4, 5], 0.0),
    rollout([1, 6], 1.0, given=2),  # a branch: its first token is another rollout's
    rollout([1, 2, 3], 0.0),
]


@pytest.fixture
def tree() -> Tree:
    return build_tree(ROLLOUTS, len(PREFIX))


def test_nodes_are_labelled_by_the_rollouts_that_chose_them(tree: Tree) -> None:
    assert tree.tokens_N.tolist() == [*QUESTION, 1, 2, 3, 4, 5, 6]
    assert tree.labels_N.tolist() == [0] * 4 + [3, 3, 2, 1, 1, 1]
    assert tree.rewards_N[4:].tolist() == pytest.approx([1 / 3, 1 / 3, 0.5, 0.0, 0.0, 1.0])
    assert tree.decides_N[4:].tolist() == [False, True, True, True, False, True]
    assert tree.paths == [[4, 5, 6], [4, 5, 7, 8], [4, 9], [4, 5, 6]]


def test_a_tree_over_a_shared_prefix_gives_every_rollouts_own_hidden_states(tree: Tree) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    backbone = AutoModel.from_config(config).eval()
    prefix = prefix_keys_values(backbone, PREFIX)
    small = pruned(tree, tree.paths[1:3])
    with torch.inference_mode():
        rows = [backbone(torch.tensor([r.prompt + r.completion])).last_hidden_state[0] for r in ROLLOUTS]
        backbone.set_attn_implementation(ATTENTION)
        whole, part = backbone(**inputs([tree, small], len(PREFIX)), prefix=prefix, use_cache=False).last_hidden_state
    for path, row in zip(tree.paths, rows, strict=True):
        torch.testing.assert_close(whole[path], row[len(PREFIX + QUESTION) :], atol=1e-5, rtol=1e-4)
    for path, row in zip(small.paths, rows[1:3], strict=True):
        torch.testing.assert_close(part[path], row[len(PREFIX + QUESTION) :], atol=1e-5, rtol=1e-4)
    assert small.labels_N[4:].tolist() == [3, 3, 1, 1, 1]


def test_a_hidden_question_leaves_its_answer_mark_and_every_node_itself(tree: Tree) -> None:
    seen = thinned(tree, hide_question=1.0, hide_token=0.0).visible_NN
    assert not seen[4:, :2].any()
    assert seen[4:, 2:4].all()
    nothing = thinned(tree, hide_question=0.0, hide_token=1.0).visible_NN
    assert torch.equal(nothing, torch.eye(len(tree.tokens_N), dtype=torch.bool))


def test_branches_leave_where_the_reference_is_unsure(tree: Tree) -> None:
    logits = torch.full((len(tree.tokens_N), 32), -30.0)
    logits[:, 0] = 30.0
    logits[5, 10 : 10 + CANDIDATES] = 30.0  # after tokens 1, 2 alone there is a choice
    logits[5, 0] = -30.0
    kept = replace(tree, paths=[path for path in tree.paths if 5 in path[:-1]])
    branches = draw_branches(kept, logits, 200, torch.Generator().manual_seed(0))
    assert {branch[:-1] for branch in branches} == {(1, 2)}
    assert {branch[-1] for branch in branches} == set(range(10, 10 + CANDIDATES))


def test_the_common_prefix_leaves_each_row_a_token() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4]]) == [1, 2]
    assert common_prefix([[1, 2], [1, 2, 4]]) == [1]


def test_rollouts_come_back_but_for_a_line_that_a_kill_cut_short(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rollouts") / "r.jsonl"
    path.write_text(to_lines(ROLLOUTS) + '{"problem": [1, 2')
    assert read_rollouts(path) == ROLLOUTS
