"""Critics with a backbone of their own.

critic    the critic as a run trains it
start     what training starts from: a decoder's first layers with a fresh head, or an earlier version
batching  which rollouts make a step, and which passes through the backbone make these
passes    from a step's rollouts to this process's batches
batches   rollouts as tensors: padded rows, or one tree of their shared prefixes
scorer    the critic's outputs at the positions that are judged, and their loss
fit       the optimisation, over any number of processes
predict   predictions on held-out rollouts
parent    the predictions of the version before
"""
