"""How fast `qsharp train` trains, beside Hugging Face's `Trainer` and a plain PyTorch loop.

    python -m benchmarks.trainer_speed
    python -m benchmarks.trainer_speed --data rollouts.parquet --kinds native

All sides train the same critic on the same rollouts by the same loss, in the same precision, with the same optimiser,
learning rates, clipping and threads, and make as many steps. The others run each rollout as a row that is padded to the
longest of its step. Steps take turns: each side makes its first step, then its second, and so on, so that a ratio is
between neighbours, who see the same machine. Peak memory is measured in a process of its own for each side.

data      rollouts of a known shape, or of Parquet files
turns     trainings that take turns
peers     the two others: any model that returns its loss
rows      a separate critic's peers: padded rows, and their loss
separate  a critic with a backbone of its own: steps of the same rollouts on all sides
states    a native critic's peers: hidden states of padded rows, kept in memory, and their loss
native    a head on the reference's hidden states: the reference's pass, then steps of the head
memory    peak memory
report    the table

A *tokens a second* of a separate critic counts the tokens of rollouts, however often they are run. A *prefixes a
second* of a native critic counts prefixes with a label, each as often as it is labelled.
"""
