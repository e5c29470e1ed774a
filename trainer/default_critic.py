"""Make the critic of the embedded default: sums of three digits with SmolLM2-135M-Instruct.

    reference=$(python -m server.presets.smollm2)                       # the model's folder
    python -m trainer.default_critic rollouts --reference $reference    # its own answers, scored
    python -m trainer.default_critic train --reference $reference       # a critic from them

Every prompt of the task opens with the same eight solved examples. Both halves use that: the shared
prefix is run once and its keys and values serve every row, in sampling and in training, with the
same result as running each row in full.
"""

import argparse
import json
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)
from transformers.cache_utils import DynamicLayer

from qsharp_core.critic.checkpoint import BernoulliCard, CriticCard, MLPCard, save
from qsharp_core.critic.model import Critic, Head, HeadShape
from qsharp_core.returns import Bernoulli
from trainer.tasks import sums

MAX_NEW_TOKENS = 48
VALIDATION_TREES = 16
"""Problems scored in one forward pass of the validation."""
ANSWER_MARK = 2
"""The question's last tokens, `Answer` and `:`."""
PrefixKeysValues = list[tuple[Tensor, Tensor]]
"""Per layer, keys and values of the shared prefix, each [kv_heads, prefix, head_dim]."""


@dataclass(frozen=True)
class Rollout:
    """One completion drawn from the reference at T = 1, up to and including its stop token."""

    problem: sums.Problem
    prompt: list[int]
    completion: list[int]
    text: str
    reward: float


# --- the shared prefix -----------------------------------------------------------------------


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    prefix: PrefixKeysValues | None = None,
    visible: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of rows that all continue one prefix, whose keys and values exist once.

    `query` is [rows, heads, new, head_dim], `key` and `value` are [rows, kv_heads, own, head_dim]:
    a row's own tokens without the prefix. Among these it is causal, or as `visible`
    [rows, 1, new, own] says. Returns [rows, new, heads, head_dim]. One softmax runs over prefix and
    own scores together, so this equals attention over the whole row.
    """
    rows, heads, new, dim = query.shape
    kv_heads, own = key.shape[1], key.shape[2]
    grouped = query.reshape(rows, kv_heads, -1, dim) * scaling  # [rows, kv_heads, group*new, dim]
    if visible is None:
        visible = torch.ones(new, own, dtype=torch.bool).tril(own - new)
    scores = (grouped @ key.mT).view(rows, heads, new, own).masked_fill(~visible, float("-inf"))
    if prefix is None:
        mixed = scores.softmax(-1).view(rows, kv_heads, -1, own) @ value
    else:
        prefix_key, prefix_value = prefix[cast(int, module.layer_idx)]
        # The rows' queries meet the prefix in one large product a head, not one a row.
        packed = grouped.transpose(0, 1).reshape(kv_heads, -1, dim)
        length = prefix_key.shape[1]
        prefix_scores = (packed @ prefix_key.mT).view(kv_heads, rows, -1, length).transpose(0, 1)
        weights = torch.cat([prefix_scores, scores.view(rows, kv_heads, -1, own)], dim=-1).softmax(-1)
        prefix_weights, own_weights = weights[..., :length], weights[..., length:]
        from_prefix = prefix_weights.transpose(0, 1).reshape(kv_heads, -1, length) @ prefix_value
        mixed = own_weights @ value + from_prefix.view(kv_heads, rows, -1, dim).transpose(0, 1)
    return mixed.view(rows, heads, new, dim).transpose(1, 2), None


AttentionInterface.register("shared_prefix", shared_prefix_attention)


def prefix_keys_values(backbone: PreTrainedModel, prefix_ids: list[int]) -> PrefixKeysValues:
    """Run the shared prefix once and keep each layer's keys and values."""
    cache = DynamicCache(config=backbone.config)
    backbone(input_ids=torch.tensor([prefix_ids]), past_key_values=cache, use_cache=True)
    layers = cast(list[DynamicLayer], cache.layers)
    return [(cast(Tensor, x.keys)[0], cast(Tensor, x.values)[0]) for x in layers]


def common_prefix(rows: list[list[int]]) -> list[int]:
    """The longest prefix that all rows share, leaving each at least one token of its own."""
    shortest = min(len(row) for row in rows) - 1
    length = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    return rows[0][:length]


# --- rollouts --------------------------------------------------------------------------------


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
        self.prefix = prefix_keys_values(self._backbone, self.prefix_ids)
        self.stop_ids = stop_token_ids(tokenizer)

    @property
    def _backbone(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.reference.get_submodule("model"))

    def sample(self, problems: list[sums.Problem]) -> list[Rollout]:
        """One completion for each entry of `problems` (an entry repeated is drawn again)."""
        distinct = sorted(set(problems))
        start = len(self.prefix_ids)
        own = torch.tensor([self.prompts[p][start:] for p in distinct])
        cache = DynamicCache(config=self.reference.config)
        logits = self._next_logits(own, cache, start)
        chosen = torch.tensor([distinct.index(p) for p in problems])
        cache.batch_select_indices(chosen)
        logits = logits[chosen]

        completions: list[list[int]] = [[] for _ in problems]
        rows = torch.arange(len(problems))  # the rows still in the batch, finished ones included
        for position in range(start + own.shape[1], start + own.shape[1] + MAX_NEW_TOKENS):
            token = torch.multinomial(logits.softmax(-1), 1)
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
        return [self._rollout(p, ids) for p, ids in zip(problems, completions, strict=True)]

    def _next_logits(self, tokens: Tensor, cache: DynamicCache, position: int) -> Tensor:
        """Logits after the rows' new tokens [rows, new], which start at `position`: [rows, V]."""
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

    def _rollout(self, problem: sums.Problem, completion: list[int]) -> Rollout:
        text = cast(str, self.tokenizer.decode(completion, skip_special_tokens=True)).split(sums.STOP, 1)[0]
        score = sums.reward(problem, text)
        return Rollout(problem, self.prompts[problem], completion, text, score)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: those whose text has a newline in it, and the end of sequence."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return {i for i, text in enumerate(texts) if sums.STOP in text} | {tokenizer.eos_token_id}


def read_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of a JSON-lines file; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [_from_json(json.loads(line)) for line in lines]


def _from_json(fields: Mapping[str, object]) -> Rollout:
    a, b, c = cast(list[int], fields["problem"])
    return Rollout(**{**fields, "problem": (a, b, c)})  # type: ignore[arg-type]


def collect(reference: Path, path: Path, samples: int, rows: int, round_size: int) -> None:
    """Append rollouts of the training problems to `path` until each has `samples` of them.

    Problems are visited in rounds of `round_size` samples, so that a run that is stopped has seen
    all of them about equally. What the file already holds is counted, not drawn again.
    """
    sampler = Sampler(
        AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32, attn_implementation="shared_prefix"),
        AutoTokenizer.from_pretrained(reference),
    )
    done = read_rollouts(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole lines only: a line cut short by a kill would swallow the one appended after it.
    path.write_text("".join(json.dumps(asdict(r)) + "\n" for r in done))
    # A seed that depends on what is there: resuming must not draw the same samples again.
    torch.manual_seed(len(done))
    todo = _missing(Counter(r.problem for r in done), samples, round_size)
    correct = sum(r.reward for r in done)
    with path.open("a") as file, tqdm(total=len(done) + len(todo), initial=len(done)) as bar:
        for start in range(0, len(todo), rows):
            with torch.inference_mode():
                drawn = sampler.sample(todo[start : start + rows])
            file.writelines(json.dumps(asdict(r)) + "\n" for r in drawn)
            file.flush()
            correct += sum(r.reward for r in drawn)
            bar.update(len(drawn))
            bar.set_postfix({"pass@1": f"{correct / bar.n:.3f}"})


def _missing(have: Counter[sums.Problem], samples: int, round_size: int) -> list[sums.Problem]:
    """Problems still to be sampled, once for each missing sample, in rounds."""
    todo = []
    for first in range(0, samples, round_size):
        for problem in sums.problems("train"):
            upto = min(first + round_size, samples)
            todo += [problem] * max(0, min(round_size, upto - max(have[problem], first)))
    return todo


# --- training --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainSettings:
    """How a critic is trained.

    A step takes `problems` with all their rollouts. `hide_question` and `hide_token` are the
    probabilities that a problem's question, or any one token, is hidden from what comes after it.
    """

    layers: int
    mlp: int
    learning_rate: float
    weight_decay: float
    epochs: int
    problems: int
    hide_question: float
    hide_token: float
    bfloat16: bool
    seed: int


@dataclass(frozen=True)
class Tree:
    """One problem's rollouts, merged where they agree: N nodes, each a token after its ancestors.

    Samples of one problem agree in most of their tokens. A node's score is asked once and judged
    by all rollouts through it, with the same loss and gradient as one row for each rollout.

    Attributes:
        tokens_N: token ids, the question's own first.
        depths_N: how far each is from the end of the shared prefix.
        visible_NN: whether the column's node is the row's ancestor or itself.
        question: how many nodes, the first ones, are the question's.
        weights_N: the sum of 1/length over the rollouts through a node; 0 in the question.
        rewards_N: mean reward of these, weighted alike.
        middles, lasts: for each rollout, the node halfway and the node of its last token.
        outcomes: for each rollout, its reward.
    """

    tokens_N: Tensor
    depths_N: Tensor
    visible_NN: Tensor
    question: int
    weights_N: Tensor
    rewards_N: Tensor
    middles: list[int]
    lasts: list[int]
    outcomes: list[float]


def build_tree(rollouts: list[Rollout], prefix_length: int) -> Tree:
    """Merge rollouts of one problem; `prefix_length` tokens of their prompt are left out."""
    question = rollouts[0].prompt[prefix_length:]
    assert all(r.prompt[prefix_length:] == question for r in rollouts)
    tokens = list(question)
    parents = list(range(-1, len(question) - 1))
    weights, wins = [0.0] * len(question), [0.0] * len(question)
    children: dict[tuple[int, int], int] = {}
    middles, lasts = [], []
    for rollout in rollouts:
        node, path = len(question) - 1, []
        for token in rollout.completion:
            if (node, token) not in children:
                children[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
                weights.append(0.0)
                wins.append(0.0)
            node = children[node, token]
            path.append(node)
            weights[node] += 1 / len(rollout.completion)
            wins[node] += rollout.reward / len(rollout.completion)
        middles.append(path[len(path) // 2])
        lasts.append(path[-1])

    depths: list[int] = []
    visible_NN = torch.eye(len(tokens), dtype=torch.bool)
    for node, parent in enumerate(parents):
        depths.append(0 if parent < 0 else depths[parent] + 1)
        if parent >= 0:
            visible_NN[node] |= visible_NN[parent]
    weights_N = torch.tensor(weights)
    return Tree(
        tokens_N=torch.tensor(tokens),
        depths_N=torch.tensor(depths),
        visible_NN=visible_NN,
        question=len(question),
        weights_N=weights_N,
        rewards_N=torch.tensor(wins) / weights_N.clamp(min=1e-9),
        middles=middles,
        lasts=lasts,
        outcomes=[r.reward for r in rollouts],
    )


def thinned(tree: Tree, settings: TrainSettings) -> Tree:
    """The tree with part of what its nodes see hidden at random, to train on.

    Equations recur between problems. With the question hidden, an equation must be judged by its
    own digits, which holds for held-out problems too; how hard a problem is does not carry over.
    """
    hidden_N = torch.rand(len(tree.tokens_N)) < settings.hide_token
    if random.random() < settings.hide_question:
        hidden_N[: tree.question - ANSWER_MARK] = True
        hidden_N[tree.question - ANSWER_MARK : tree.question] = False
    itself_NN = torch.eye(len(tree.tokens_N), dtype=torch.bool)
    return replace(tree, visible_NN=tree.visible_NN & ~hidden_N | itself_NN)


def score_trees(critic: Critic, prefix_ids: list[int], trees: list[Tree]) -> Tensor:
    """The critic's outputs at every node, padded on the right: `[trees, nodes, n_out]`."""
    widest = max(len(t.tokens_N) for t in trees)
    room = [widest - len(t.tokens_N) for t in trees]
    tokens = torch.stack([F.pad(t.tokens_N, (0, r)) for t, r in zip(trees, room, strict=True)])
    depths = torch.stack([F.pad(t.depths_N, (0, r)) for t, r in zip(trees, room, strict=True)])
    visible = [F.pad(t.visible_NN, (0, r, 0, r)) for t, r in zip(trees, room, strict=True)]
    backbone = cast(PreTrainedModel, critic.backbone)
    hidden = backbone(
        input_ids=tokens,
        position_ids=depths + len(prefix_ids),
        use_cache=False,
        prefix=prefix_keys_values(backbone, prefix_ids),
        visible=torch.stack(visible)[:, None],
    ).last_hidden_state
    return critic.head.at_tokens(hidden)


def tree_loss(critic: Critic, prefix_ids: list[int], trees: list[Tree]) -> Tensor:
    """Negative log-likelihood in nats: mean within each rollout, then over the trees' rollouts."""
    outputs = score_trees(critic, prefix_ids, trees)
    total = outputs.new_zeros(())
    for row, tree in zip(outputs, trees, strict=True):
        nats_N = critic.distribution.loss(row[: len(tree.tokens_N)], tree.rewards_N)
        total = total + (nats_N * tree.weights_N).sum()
    return total / sum(len(t.outcomes) for t in trees)


@torch.inference_mode()
def validate(critic: Critic, prefix_ids: list[int], trees: list[Tree]) -> dict[str, float]:
    """Log-loss (nats) of the critic and of the constant base rate, and AUC over rollouts."""
    loss, middles, lasts, outcomes = 0.0, [], [], []
    scored = [
        row
        for start in range(0, len(trees), VALIDATION_TREES)
        for row in score_trees(critic, prefix_ids, trees[start : start + VALIDATION_TREES])
    ]
    for tree, padded in zip(trees, scored, strict=True):
        outputs = padded[: len(tree.tokens_N)]
        nats_N = critic.distribution.loss(outputs, tree.rewards_N)
        loss += float((nats_N * tree.weights_N).sum())
        middles.append(outputs[tree.middles, 0])
        lasts.append(outputs[tree.lasts, 0])
        outcomes += tree.outcomes
    won = torch.tensor(outcomes) > 0.5
    rate = won.double().mean()
    return {
        "log_loss": loss / len(outcomes),
        "log_loss_constant": float(torch.special.entr(torch.stack([rate, 1 - rate])).sum()),
        "auc_middle": area_under_curve(torch.cat(middles), won),
        "auc_last": area_under_curve(torch.cat(lasts), won),
        "rollouts": float(len(outcomes)),
        "reference_accuracy": float(rate),
    }


def area_under_curve(scores: Tensor, won: Tensor) -> float:
    """P(a won rollout scores above a lost one), ties counting half."""
    lost, gained = scores[~won].sort().values, scores[won]
    below = torch.searchsorted(lost, gained) + torch.searchsorted(lost, gained, right=True)
    return float(below.double().mean() / 2 / len(lost))


def truncated_critic(reference: Path, layers: int, width: int) -> Critic:
    """The reference's first `layers` layers with a fresh MLP head of `width` hidden units.

    The token embeddings stay the reference's, frozen: they are 5/6 of so small a critic.
    """
    backbone = AutoModel.from_pretrained(
        reference,
        dtype=torch.float32,
        num_hidden_layers=layers,
        attn_implementation="shared_prefix",
    )
    backbone.get_input_embeddings().requires_grad_(False)
    config = backbone.config
    shape = HeadShape("V", config.hidden_size, n_out=1, vocab=config.vocab_size, mlp=width)
    return Critic(backbone, Head(shape), Bernoulli())


def fit(
    critic: Critic,
    prefix_ids: list[int],
    training: list[Tree],
    validation: list[Tree],
    settings: TrainSettings,
) -> None:
    """Muon for matrices and AdamW for the rest; `critic` ends with the weights of its best epoch.

    Adding digits is something three layers have to learn anew; Muon gets there in fewer steps.
    """
    torch.manual_seed(settings.seed)
    random.seed(settings.seed)
    parameters = [p for p in critic.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2 and p.shape[0] > 1]
    others = [p for p in parameters if not (p.ndim == 2 and p.shape[0] > 1)]
    rate, decay = settings.learning_rate, settings.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=decay),
    ]
    steps = settings.epochs * math.ceil(len(training) / settings.problems)
    schedules = [
        get_cosine_schedule_with_warmup(o, num_warmup_steps=steps // 20, num_training_steps=steps) for o in optimizers
    ]
    best, best_loss = critic.state_dict(), float("inf")
    with tqdm(total=steps, unit="step") as bar:
        for epoch in range(1, settings.epochs + 1):
            order = torch.randperm(len(training)).tolist()
            for start in range(0, len(order), settings.problems):
                chosen = order[start : start + settings.problems]
                batch = [thinned(training[i], settings) for i in chosen]
                with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
                    loss = tree_loss(critic, prefix_ids, batch)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                bar.update()
                bar.set_postfix({"epoch": epoch, "loss": f"{loss.item():.4f}"})
            metrics = validate(critic, prefix_ids, validation)
            tqdm.write(json.dumps({"epoch": epoch, **metrics}))
            if metrics["log_loss"] < best_loss:
                best_loss = metrics["log_loss"]
                best = {k: v.clone() for k, v in critic.state_dict().items()}
    critic.load_state_dict(best)


def train(reference: Path, rollouts_path: Path, output: Path, settings: TrainSettings, card: CriticCard) -> None:
    """Train a critic on the rollouts; write its folder in bfloat16, with validation metrics."""
    if output.exists():
        raise SystemExit(f"{output} exists: choose another --output, or remove it")
    rollouts = read_rollouts(rollouts_path)
    prefix_ids = common_prefix([r.prompt for r in rollouts])
    by_problem: dict[sums.Problem, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_problem[rollout.problem].append(rollout)
    trees = {p: build_tree(rs, len(prefix_ids)) for p, rs in by_problem.items()}
    held_back = validation_triples()
    training = [tree for p, tree in trees.items() if sums.unordered(p) not in held_back]
    validation = [tree for p, tree in trees.items() if sums.unordered(p) in held_back]

    torch.manual_seed(settings.seed)
    critic = truncated_critic(reference, settings.layers, settings.mlp)
    fit(critic, prefix_ids, training, validation, settings)

    # Metrics of what is stored: the weights as they are after rounding.
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.copy_(parameter.bfloat16())
    metrics = validate(critic, prefix_ids, validation)
    config = cast(PreTrainedConfig, critic.backbone.config)
    config.update({"dtype": torch.bfloat16, "architectures": ["LlamaModel"]})
    extra = {
        "metrics": {
            "validation": metrics,
            "training_rollouts": sum(len(t.outcomes) for t in training),
        },
        "training": asdict(settings),
    }
    save(output, card.model_copy(update=extra), critic.to(torch.bfloat16))
    print(json.dumps(metrics, indent=2))


def validation_triples() -> set[sums.Problem]:
    """Twelve training triples whose rollouts only measure: for early stopping and the metrics."""
    triples = sorted({sums.unordered(p) for p in sums.problems("train")})
    return set(random.Random(0).sample(triples, 12))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer.default_critic", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    rollouts = commands.add_parser("rollouts", help="sample and score the reference's answers")
    rollouts.add_argument("--samples", type=int, default=16, help="rollouts of each problem")
    rollouts.add_argument("--rows", type=int, default=128, help="rollouts sampled at a time")
    rollouts.add_argument("--round-size", type=int, default=8, help="samples of a problem a round")

    training = commands.add_parser("train", help="train a critic on the rollouts")
    training.add_argument("--output", type=Path, required=True, help="critic folder to write")
    training.add_argument("--version", default="1", help="the critic's version")
    training.add_argument("--eta", type=float, help="recommended eta to write into the card")
    training.add_argument("--layers", type=int, default=3, help="layers taken from the reference")
    training.add_argument("--mlp", type=int, default=512, help="hidden units of the head")
    training.add_argument("--learning-rate", type=float, default=1e-3)
    training.add_argument("--weight-decay", type=float, default=0.1)
    training.add_argument("--epochs", type=int, default=12)
    training.add_argument("--problems", type=int, default=8, help="problems in a step")
    training.add_argument(
        "--hide-question",
        type=float,
        default=0.5,
        help="probability that a problem is trained on without seeing its question",
    )
    training.add_argument(
        "--hide-token",
        type=float,
        default=0.1,
        help="probability that a token is hidden from those after it",
    )
    training.add_argument(
        "--bfloat16",
        action="store_true",
        help="matrix products in bfloat16: several times faster where the CPU has them",
    )
    training.add_argument("--seed", type=int, default=0)

    for command in (rollouts, training):
        command.add_argument("--reference", type=Path, required=True, help="the model's folder")
        command.add_argument(
            "--rollouts",
            type=Path,
            default=Path("runs/sums/rollouts.jsonl"),
            help="JSON-lines file of rollouts; sampling resumes where it ends",
        )
        command.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's threads")
    return parser.parse_args()


def _card(args: argparse.Namespace) -> CriticCard:
    return CriticCard.model_validate(
        {
            "name": "sums",
            "version": args.version,
            "head": "V",
            "distribution": BernoulliCard(kind="bernoulli"),
            "mlp": MLPCard(width=args.mlp),
            "borrow": ["input_embeddings"],
            "recommended_eta": args.eta,
            "reference": "SmolLM2-135M-Instruct",
            "sampling_policy": {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
        }
    )


def main() -> None:
    """Run the chosen half."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    if args.command == "rollouts":
        collect(args.reference, args.rollouts, args.samples, args.rows, args.round_size)
    else:
        settings = TrainSettings(
            layers=args.layers,
            mlp=args.mlp,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            epochs=args.epochs,
            problems=args.problems,
            hide_question=args.hide_question,
            hide_token=args.hide_token,
            bfloat16=args.bfloat16,
            seed=args.seed,
        )
        train(args.reference, args.rollouts, args.output, settings, _card(args))


if __name__ == "__main__":
    main()
