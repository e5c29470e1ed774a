"""The columns of rollouts in a Parquet file: what the server exports and imports, and what the trainer reads.

A column per field of `qsharp_core.rollouts.records.Rollout`. What has no fixed shape is JSON in a text column (`JSON`).
`rewards` is the history, a list of {reward, source, created, given_by}. Files from before rollouts had owners lack
`owner` and `given_by`, and are still read.
"""

import pyarrow as pa

_TOKENS = pa.list_(pa.int32())
_REWARDS = pa.list_(
    pa.struct(
        [
            pa.field("reward", pa.float64(), False),
            ("source", pa.string()),
            pa.field("created", pa.float64(), False),
            ("given_by", pa.string()),
        ]
    )
)


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


SCHEMA = pa.schema(
    [
        _required("id", pa.string()),
        ("owner", pa.string()),
        _required("request_id", pa.string()),
        _required("choice", pa.int32()),
        _required("route", pa.string()),
        _required("created", pa.float64()),
        _required("model", pa.string()),
        _required("prompt_token_ids", _TOKENS),
        _required("completion_token_ids", _TOKENS),
        ("prompt_text", pa.string()),
        _required("completion_text", pa.string()),
        ("messages", pa.string()),
        ("response", pa.string()),
        _required("temperature", pa.float64()),
        _required("top_p", pa.float64()),
        _required("top_k", pa.int32()),
        _required("min_p", pa.float64()),
        ("seed", pa.int64()),
        _required("sampling_other", pa.string()),
        ("eta", pa.float64()),
        ("method", pa.string()),
        ("critic", pa.string()),
        ("guidance", pa.string()),
        ("first_valid_position", pa.int32()),
        ("parent_id", pa.string()),
        ("cut", pa.int32()),
        _required("kl", pa.float64()),
        ("value", pa.float64()),
        ("finish_reason", pa.string()),
        _required("metadata", pa.string()),
        ("reward", pa.float64()),
        _required("rewards", _REWARDS),
    ]
)
JSON = ("messages", "response", "guidance", "sampling_other", "metadata")
# What makes a model's next-token distribution the reference policy, and the seed that it was sampled with.
POLICY = ("temperature", "top_p", "top_k", "min_p")
SAMPLING = (*POLICY, "seed")
# Training needs the first, and uses the second where a file has them.
LABELLED = ("id", "prompt_token_ids", "completion_token_ids", "first_valid_position", "reward")
DESCRIBED = (*POLICY, "metadata")
# Whose rollouts, and whose rewards.
OWNER, REWARDS = "owner", "rewards"
assert {*JSON, *SAMPLING, *LABELLED, *DESCRIBED, OWNER, REWARDS} <= set(SCHEMA.names)
