"""Whether a critic's values come true, by position, and what scaling its logits by one temperature changes.

    qsharp run demo
    python -m benchmarks.calibration --critic runs/demo/critics/sums/1 --data runs/demo/loop/round-0/rollouts.parquet

The values are those of the critic's folder at every labelled position of held-out rollouts. The temperature is the one
that makes these rollouts' log-loss the least. It is fitted twice to say what it gains: on either half of the held-out
prompts, and then the other half is measured. The temperature that is served is fitted on all of them.

A critic whose last layer is divided by the temperature is a critic like any other: it is written as a folder, and both
are served side by side and measured on the task's held-out problems at the same `eta`.

outputs      a critic's outputs at labelled positions
fitting      the temperature
scaled       the folder of the scaled critic
guided       accuracy and KL of both
report       tables, and the diagrams
"""
