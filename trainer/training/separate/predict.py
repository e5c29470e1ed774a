"""Predictions of a critic with a backbone of its own, at every valid position of rollouts."""

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from trainer.training.heldout import Predictions, predictions
from trainer.training.rollouts import Rollouts
from trainer.training.separate.batching import plan_epoch
from trainer.training.separate.passes import Passes
from trainer.training.separate.scorer import LabelScorer, outputs_of


@torch.no_grad()  # what is gathered in inference mode, a sharded critic could not be trained on
def predict(
    scorer: LabelScorer, rollouts: Rollouts, passes: Passes, accelerator: Accelerator, tokens: int = 65536
) -> Predictions:
    """A critic's predictions, computed on its device, by all processes together, in the precision of its weights.

    Args:
        scorer: the critic, in evaluation mode; if it is sharded, in the processes that share it.
        rollouts: what it reads.
        passes: how rollouts are run.
        accelerator: devices and processes.
        tokens: the tokens of the rollouts that the processes divide among themselves at a time.
    """
    returns = scorer.critic.distribution
    parts = []
    chunks = plan_epoch(rollouts, tokens, passes.trees, seed=0, epoch=0)
    main = accelerator.is_main_process
    for chunk in tqdm(chunks, desc="held-out", unit="batch", leave=False, disable=not main):
        for batch in (b.to(accelerator.device) for b in passes.batches(chunk, rollouts)):
            outputs_L = outputs_of(scorer, batch)
            losses = returns.loss(outputs_L, batch.rewards)
            columns = (batch.rollout, batch.position, returns.mean(outputs_L), losses)
            rows = torch.stack([c.double() for c in columns], dim=1)
            parts.append(rows[batch.weights > 0])
    table = torch.cat(parts)
    if accelerator.num_processes > 1:
        table = accelerator.gather(accelerator.pad_across_processes(table, dim=0, pad_index=-1))
        table = table[table[:, 0] >= 0]
    rollout, position, predicted, losses = table.cpu().numpy().T
    return predictions(rollout.astype(np.int64), position.astype(np.int64), predicted, losses, rollouts)
