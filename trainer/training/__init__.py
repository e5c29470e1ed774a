"""Logged rollouts become the next version of a critic.

A run, whatever is trained:

settings      what decides what is learned, checked once
outputs       where results go
data          Parquet files as rollouts with labels: the label rule, refusals with counts, the split by prompt
prefix_tree   rollouts merged where they begin alike
rows          sequences run as padded rows
siblings      labels weighed by node of that tree
prepare       from files to what a run trains and measures on
trainable     what a run asks of a critic
plan          how long a run trains, in which steps, where nobody has said
sharded       weights, gradients and moments divided among processes
rollouts      labelled rollouts: an index in memory, tokens on disk
spill         numbers on disk
families      rollouts cut into parts that need one tree each
threads       how many threads it takes, by what is free
optimisation  the training loop: steps, schedules, clipping, progress
stopping      what Ctrl-C does while steps are made
train         a run from rollouts to a published version
run           a run's folder: checkpoints, metrics, what makes it resume exactly
heldout       predictions on held-out prompts, and their measures
constant      whether a critic has learned anything
measures      log-loss, Brier, AUC, ECE: pure functions
parents       the comparison with the version before
report        metrics.json and metrics.jsonl as models
reliability   what was earned where a critic expected so much
plots         the calibration plot
learning_plot the learning curve
show          what is printed
tracking      who sees the metrics while a run runs: TensorBoard, W&B, MLflow
publish, card the next version, and its critic.json
remote_versions
              versions in an object store
base          folders of base models
job           a run described by a file, as `qsharp loop` starts it
launcher      training in the processes that a launcher of choice starts
lifeline      processes that end with the one that started them

separate/     critics with a backbone of their own
native/       critics that are a head on the reference's hidden states
features/     what the reference says of rollouts, computed once and kept
"""
