"""Rollouts of the reference: whole answers, and continuations of given beginnings."""

from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from trainer.default_critic.branching import draw_branches
from trainer.default_critic.prefix import ATTENTION, common_prefix, prefix_keys_values
from trainer.default_critic.rollouts import Rollout, read_rollouts, to_lines
from trainer.default_critic.trees import Tree, build_tree, inputs
from trainer.tasks import sums

MAX_NEW_TOKENS = 48
Start = tuple[sums.Problem, tuple[int, ...]]
"""A problem and the tokens that its completion begins with, mostly none."""


class Sampler:
    """Draws completions of the task's prompts from the reference at T = 1, many rows at a time."""

    def __init__(self, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.reference = reference
        self.tokenizer = tokenizer
        self.prompts = {
            problem: cast(list[int], tokenizer(sums.prompt(problem)).input_ids)
            for problem in sums.problems("train") + sums.problems("held_out")
        }
        # Digits are single tokens, so all prompts are equally long and rows move in step.
        assert len({len(ids) for ids in self.prompts.values()}) == 1
        self.prefix_ids = common_prefix(list(self.prompts.values()))
        backbone = cast(PreTrainedModel, reference.get_submodule("model"))
        self.prefix = prefix_keys_values(backbone, self.prefix_ids)
        self.stop_ids = stop_token_ids(tokenizer)

    def sample(self, starts: list[Start]) -> list[Rollout]:
        """One completion for each start (one repeated is drawn again); all begin with equally many tokens."""
        distinct = sorted(set(starts))
        before = len(self.prefix_ids)
        own = torch.tensor([self.prompts[problem][before:] + list(given) for problem, given in distinct])
        cache = DynamicCache(config=self.reference.config)
        logits = self._next_logits(own, cache, before)
        chosen = torch.tensor([distinct.index(start) for start in starts])
        cache.batch_select_indices(chosen)
        logits = logits[chosen]

        completions = [list(given) for _, given in starts]
        rows = torch.arange(len(starts))  # the rows still in the batch
        after = before + own.shape[1]
        for position in range(after, after + MAX_NEW_TOKENS - len(completions[0])):
            token = torch.multinomial(logits.float().softmax(-1), 1)
            going = []
            for slot, row in enumerate(rows.tolist()):
                completions[row].append(int(token[slot]))
                if completions[row][-1] not in self.stop_ids:
                    going.append(slot)
            if not going:
                break
            if len(going) < len(rows):
                keep = torch.tensor(going)
                rows, token = rows[keep], token[keep]
                cache.batch_select_indices(keep)
            logits = self._next_logits(token, cache, position)
        return [
            self._rollout(problem, ids, len(given)) for (problem, given), ids in zip(starts, completions, strict=True)
        ]

    def tree_logits(self, tree: Tree) -> Tensor:
        """The reference's logits after every node of a tree, `[nodes, vocab]`."""
        arguments = inputs([tree], len(self.prefix_ids))
        return cast(Tensor, self.reference(**arguments, use_cache=False, prefix=self.prefix).logits[0].float())

    def _next_logits(self, tokens: Tensor, cache: DynamicCache, position: int) -> Tensor:
        """Logits after the rows' new tokens [rows, new], which start at `position`: [rows, vocab]."""
        positions = torch.arange(position, position + tokens.shape[1])[None]
        output = self.reference(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            prefix=self.prefix,
        )
        return cast(Tensor, output.logits[:, -1])

    def _rollout(self, problem: sums.Problem, completion: list[int], given: int) -> Rollout:
        text = cast(str, self.tokenizer.decode(completion, skip_special_tokens=True)).split(sums.STOP, 1)[0]
        return Rollout(problem, self.prompts[problem], completion, text, sums.reward(problem, text), given)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: those whose text has a newline in it, and the end of sequence."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return {i for i, text in enumerate(texts) if sums.STOP in text} | {tokenizer.eos_token_id}


@torch.inference_mode()
def collect(reference: Path, path: Path, samples: int, branches: int, rows: int, dtype: torch.dtype) -> None:
    """Append rollouts to `path` until each training problem has `samples` whole ones and `branches` that leave these.

    What the file already holds is counted, not drawn again.
    """
    sampler = Sampler(
        AutoModelForCausalLM.from_pretrained(reference, dtype=dtype, attn_implementation=ATTENTION).eval(),
        AutoTokenizer.from_pretrained(reference),
    )
    done = read_rollouts(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole lines only: a line cut short by a kill would swallow the one appended after it.
    path.write_text(to_lines(done))
    # A seed that depends on what is there: resuming must not draw the same samples again.
    generator = torch.manual_seed(len(done))

    def whole() -> list[Start]:
        have = Counter(r.problem for r in done if not r.given)
        return [(p, ()) for turn in range(samples) for p in sums.problems("train") if have[p] <= turn]

    def branching() -> list[Start]:
        have = Counter(r.problem for r in done if r.given)
        starts: list[Start] = []
        for problem in tqdm(sums.problems("train"), desc="branch points", unit="problem"):
            tree = build_tree([r for r in done if r.problem == problem and not r.given], len(sampler.prefix_ids))
            missing = max(0, branches - have[problem])
            drawn = draw_branches(tree, sampler.tree_logits(tree), missing, generator) if missing else []
            starts += [(problem, given) for given in drawn if given[-1] not in sampler.stop_ids]
        return starts

    stages: list[tuple[str, Callable[[], list[Start]]]] = [("rollouts", whole), ("branches", branching)]
    for name, wanted in stages:
        starts = wanted()
        correct = drawn = 0
        with path.open("a") as file, tqdm(total=len(starts), desc=name, unit="rollout") as bar:
            for batch in _batches(starts, rows):
                made = sampler.sample(batch)
                file.write(to_lines(made))
                file.flush()
                done += made
                correct, drawn = correct + sum(r.reward > 0.5 for r in made), drawn + len(made)
                bar.update(len(made))
                bar.set_postfix({"right": f"{correct / drawn:.3f}"})


def _batches(starts: list[Start], rows: int) -> list[list[Start]]:
    """At most `rows` starts each, all with equally many given tokens; the order stays among equals."""
    batches = []
    for _, group in groupby(sorted(starts, key=lambda s: len(s[1])), key=lambda s: len(s[1])):
        same = list(group)
        batches += [same[i : i + rows] for i in range(0, len(same), rows)]
    return batches
