"""Guidance inside vLLM's worker: thin glue between vLLM's model runners and `qsharp_core`, no maths.

params      a request's guidance, as it travels in `SamplingParams.extra_args`
settings    what the engine is started with (`--additional-config '{"qsharp": {…}}'`)
registry    critics loaded in this worker, versions, who uses them
core        one guided step over a batch, the same for both runners
ranks       tensor parallelism: what the first rank tells the others
v1, v2      logits processors for vLLM's two model runners
upstream    every reach into vLLM's internals
worker      worker extension: load, activate, unload, score
telemetry   per-step reports to the API process
"""
