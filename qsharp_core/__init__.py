"""Q-sharp (arXiv 2502.20548) and what it takes to serve it.

returns         return distributions: tilt, mean, loss
policy          the guided policy: candidates, tilted logits, KL, value
residual        the Bellman residual: whether a critic agrees with itself
critic/         critics: models, folders on disk, scoring
vllm_plugin/    guidance inside vLLM's worker
rollouts/       what a rollout is, which of its positions a reward labels, rollouts as Parquet
wire/           what travels between programs, by name
cli             the command `qsharp`
errors          every error that is raised on purpose
locations, object_store
                where a critic's folder may be: paths and URLs; object stores through fsspec
disk, precision, transfer, user_cache
                durable files; fast dtypes; copies to a device; what can be made again
"""
