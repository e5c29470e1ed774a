"""Rollouts as what fine-tuning learns from: the model's own successful samples, and pairs of a right and a wrong one.

What counts as the model's own sample:

- A whole rollout that nothing guided is one from its first token on.
- A branch shares the beginning of another rollout, and takes a token there that was forced. Its tail, after that token,
  is the model's own sample of how to go on; the beginning and the forced token are not. The same goes for whatever
  continues a guided rollout.
- What a critic guided is none.

So rejection sampling, which imitates samples, learns from tails alone, and sees what is before them as a prompt. DPO
learns which of two completions is better, whoever drew them: its pairs are of whole completions of one prompt, whose
rewards are those of the whole. What the two of a pair begin with in common adds the same to both, and cancels.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import pyarrow.parquet as pq

from qsharp_core.returns import Bernoulli
from trainer.training.data import check, read
from trainer.training.rollouts import SamplingPolicy
from trainer.training.settings import TrainingError

IGNORED = -100
"""The label of a token that adds nothing to the loss."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A completion that no critic guided, and whether it was right.

    Attributes:
        prompt, completion: token ids.
        own: from this token of the completion on the model drew all of them.
        right: whether it earned 1; it earned 0 otherwise.
    """

    prompt: list[int]
    completion: list[int]
    own: int
    right: bool


def read_drawn(path: Path, vocab: int) -> list[Drawn]:
    """The rollouts of a Parquet file that no critic guided, in the order of their ids.

    Args:
        path: of `qsharp export`.
        vocab: tokens that the model has.

    Raises:
        TrainingError: there are none, or they were not drawn from the model's own distribution, or did not earn 0 or 1.
    """
    data = read([path])
    policies = check(data, Bernoulli(), vocab, mixed_policies=False)
    if policies != [SamplingPolicy()]:
        raise TrainingError(
            f"{path}: rollouts were drawn by {policies[0]}; what is compared is the model's own law, {SamplingPolicy()}"
        )
    rows = pq.read_table(path, columns=["id", "eta", "cut"]).to_pylist()
    cuts = {row["id"]: row["cut"] or 0 for row in rows if row["eta"] is None}
    return [
        Drawn(prompt=one.prompt.tolist(), completion=one.completion.tolist(), own=cuts[one.id], right=one.reward == 1)
        for one in data.rollouts
        if one.id in cuts
    ]


def examples(rollouts: Sequence[Drawn]) -> list[dict[str, list[int]]]:
    """What rejection sampling imitates: successful samples, as TRL's `SFTTrainer` takes them tokenised."""
    return [
        {
            "input_ids": one.prompt + one.completion,
            "labels": [IGNORED] * (len(one.prompt) + one.own) + one.completion[one.own :],
        }
        for one in rollouts
        if one.right and one.own < len(one.completion)
    ]


def pairs(rollouts: Sequence[Drawn], seed: int) -> list[dict[str, list[int]]]:
    """A right and a wrong completion of one prompt, as TRL's `DPOTrainer` takes them tokenised.

    Each completion of a prompt that has both is in a pair; those of the rarer side are in several, as evenly as can be.

    Args:
        rollouts: completions.
        seed: says who is paired with whom.
    """
    dice = random.Random(seed)
    of_prompt: dict[tuple[int, ...], dict[bool, list[list[int]]]] = defaultdict(lambda: {True: [], False: []})
    for one in rollouts:
        of_prompt[tuple(one.prompt)][one.right].append(one.completion)
    made = []
    for prompt, sides in of_prompt.items():
        if not all(sides.values()):
            continue
        most = max(map(len, sides.values()))
        right, wrong = (islice(cycle(dice.sample(side, len(side))), most) for side in (sides[True], sides[False]))
        made += [
            {"prompt_ids": list(prompt), "chosen_ids": good, "rejected_ids": bad}
            for good, bad in zip(right, wrong, strict=True)
        ]
    return made
