"""The trainer's commands: one file for each `qsharp COMMAND`, with `main(argv)`.

collect           sample a task's problems through a server, which stores the rollouts
reward            have verifiers judge stored rollouts
export            write stored rollouts to a Parquet file
train             make the next version of a critic from Parquet files
evaluate          measure a task's accuracy against KL
loop              rounds of all of these
run               an experiment that a recipe describes
options           flags that several commands share
training_options  the flags of `train`, which `loop` takes, too
interruption      commands that SIGTERM and Ctrl-C stop in order

`qsharp_core.cli` lists the commands and imports them when they run.
"""
