"""Rollouts, sampled and logged through a running server over HTTP.

errors          what a request to a server can end with
retrying        when a failed request is sent again, and when it is given up
client          the HTTP client
concurrency     many coroutines, a few of them at a time
parameters      the sampling and guidance fields of a request
collection      what is to be collected, as items with stable keys, seeds and cuts
collect         collects what is missing
branching       where a branch leaves another rollout: pure functions
branch_parents  the rollouts that branches leave, read from the server
export          stored rollouts as a Parquet file
journal         what a command has done, so that it can go on where it was killed
"""
