"""Rollouts: sampled completions that were stored to learn from, and their rewards.

`records` says what a rollout is and which of its positions may be trained on, `parquet` writes and reads files of them,
`foreign` takes files that come from elsewhere, and `text` makes texts fit for any database. The server's store is in
`server.store`.
"""
