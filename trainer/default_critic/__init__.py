"""Makes the critic of the embedded default: sums of three digits with SmolLM2-135M-Instruct.

    reference=$(python -m server.presets.smollm2)                     # the model's folder
    python -m trainer.default_critic rollouts --reference $reference  # its own answers, scored
    python -m trainer.default_critic train --reference $reference --output critic

`prefix` runs the prompt's solved examples once for all rows, `sampling` draws rollouts, `branching` chooses where
further ones leave them, `trees` merges a problem's rollouts, `training` fits a critic to the trees.
"""
