"""What travels between client, server, worker, store and trainer, under names that both sides must agree on.

| module | what it names | who writes it, who reads it |
|---|---|---|
| `guidance` | methods, tails, the fields of a request's guidance and their limits | clients, server, worker |
| `metadata` | the metadata entries of requests and rollouts that this project gives a meaning to | trainer, server |
| `columns` | the columns of rollouts in a Parquet file | server, trainer |
| `critics` | a critic's state: the worker's answer to the server, the server's to clients | worker, server, commands |

A step's report has its types in `qsharp_core.vllm_plugin.telemetry`, a critic's folder in `qsharp_core.critic`.
"""
