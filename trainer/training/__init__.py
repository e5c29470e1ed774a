"""`qsharp train`: logged rollouts become the next version of a critic.

settings    what a run is made of, checked once
data        Parquet files to rollouts: the label rule, refusals with counts, the split by prompt
batching    which rollouts make a step, and which passes through the backbone make these
batches     rollouts as tensors: padded rows, or one tree of their shared prefixes
scorer      the critic's outputs at the positions that are judged
model       a critic to start from: a Hugging Face decoder's first layers, or an earlier version
fit         the optimisation, over any number of processes
run         a run's folder: checkpoints, metrics, what makes it resume exactly
heldout     predictions on held-out prompts, and their report
measures    log-loss, Brier, AUC, ECE: pure functions
plots       the calibration plot
publish     the next version on disk
command     the command line
"""
