"""The trainer as functions, for notebooks and scripts: what the package `qsharp` exports.

client    a client of a server, with typed responses
collect   sample problems through a server, which stores the rollouts
reward    have verifiers judge stored rollouts
export    stored rollouts as a Parquet file
train     make the next version of a critic
evaluate  accuracy against KL
score     what a critic expects of texts
calling   coroutines run from plain code, in notebooks, too

Functions have the names and defaults of the commands' flags. The commands call them.
"""
