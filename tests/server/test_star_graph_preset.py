"""The pair that comes with the project, by plain forward passes."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qsharp_core import policy
from qsharp_core.critic.checkpoint import check_vocabulary, load, read_card
from qsharp_core.wire.guidance import Tail
from server.presets.known import PRESETS
from trainer.experiments.star_graph.critic import outputs_of, right_arm
from trainer.experiments.star_graph.rows import PROMPT, rows_of
from trainer.rewards.base import Case
from trainer.rewards.builtin import star_graph as verify
from trainer.tasks.star_graph import Shape, draw

CPU = torch.device("cpu")
PRESET = PRESETS["star-graph"]
GRAPHS = 100


@torch.inference_mode()
def guided(eta: float | None) -> list[bool]:
    """Whether the preset's paths are right, sampled by plain forward passes."""
    folder = PRESET.model()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder)
    card, critic = load(PRESET.critic_folder)
    check_vocabulary(card, PRESET.critic_folder, critic, tokens)
    graphs = [draw(Shape(), f"test-{i}") for i in range(GRAPHS)]
    histories = torch.tensor(tokens([g.prompt for g in graphs])["input_ids"])
    start = histories.shape[1]
    torch.manual_seed(0)
    rows, ones = len(graphs), torch.ones(GRAPHS, dtype=torch.float64)
    for _ in range(6):
        logits = reference(histories).logits[:, -1]
        if eta is not None:
            chosen = policy.select_candidates(logits, None, policy.least_log_ref([10] * rows, [0.0] * rows, 10))
            made = rows_of(histories.tolist(), [[[y] for y in row] for row in chosen.ids_RK.tolist()], CPU)
            outputs = outputs_of(critic, made)[made.branch > PROMPT].view(rows, -1, 1)
            tilts = critic.distribution.relative_tilt(outputs.double(), torch.tensor(eta, dtype=torch.float64))
            floor = policy.tail_tilt(Tail.FLOOR, eta, (0.0, 1.0)) * ones
            step = policy.guide(chosen, tilts, eta * ones, torch.zeros(rows, dtype=torch.bool), floor, ones)
            logits = policy.guide_logits_(logits, ones, chosen, step)
        histories = torch.cat([histories, torch.multinomial(logits.softmax(-1), 1)], 1)
    texts = [tokens.decode(row[: row.index(0)] if 0 in row else row) for row in histories[:, start:].tolist()]
    return [verify(Case(completion=text, prompt=g.prompt)) == 1 for text, g in zip(texts, graphs, strict=True)]


def test_the_preset_is_right_far_more_often_when_guided() -> None:
    unguided, strong = sum(guided(None)), sum(guided(read_card(PRESET.critic_folder).recommended_eta))
    assert 8 <= unguided <= 35  # 20 by the shortcut; four standard errors
    assert strong >= 95
    _, critic = load(PRESET.critic_folder)
    tokens = AutoTokenizer.from_pretrained(PRESET.model())
    assert right_arm(critic, tokens, [draw(Shape(), f"test-{i}") for i in range(GRAPHS)], CPU) >= 0.97
