"""Guidance against fine-tuning: the same rollouts, the same seconds of training, the same held-out problems.

    examples     rollouts as what fine-tuning learns from: examples, and pairs
    budget       ends a training when its seconds are spent
    tuning       trains a model by TRL
    divergence   KL divergence of a fine-tuned model from the reference
    measuring    samples the reference, guided and not, and every fine-tuned model, through HTTP
    report       the rows as a table, a plot and JSON's data

`python -m benchmarks.alternatives --help` says how it is run.
"""
