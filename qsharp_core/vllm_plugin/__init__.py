"""Guidance inside vLLM's worker: thin glue between vLLM's model runners and `qsharp_core`, without maths of its own.

What enters:

params      a request's guidance, as it travels in `SamplingParams.extra_args`
settings    what the engine is started with (`--additional-config '{"qsharp": {…}}'`), and what is refused at the start
v1, v2      logits processors for vLLM's two model runners
processors  which of the two fits an engine
worker      worker extension: load, activate, unload, score, by remote calls
upstream    every reach into vLLM's internals

A guided step, the same for both runners:

step        guides the steps of a worker: selects candidates, asks, tilts, reports
rows        the requests that are guided or observed, and their rows of logits
plan        what follows from a step's requests alone
tilts       asks the critics
ranks       tensor parallelism: what the first rank tells the others
report      what a step reports, once its tokens are sampled
telemetry   the format of reports, and the socket to the API process
audit       scores a random share of rows again, without the cache

Critics in the worker:

registry    loaded versions, which are active, how many requests use them
loading     makes critics of their files, with the worker's settings
loads       loads that run beside the engine, and are given up if they hang
flash       vLLM's attention kernel, for critics on GPUs
cores       threads on the core that vLLM leaves over
memory      the C library's allocator, on CPUs
logs        lines of vLLM's log that are left out
"""
