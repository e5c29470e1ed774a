from typing import Any

import pytest
from vllm import SamplingParams

from qsharp_core.errors import GuidanceError
from qsharp_core.vllm_plugin.params import GuidanceParams, check_sampling_params


def test_extra_args_round_trip() -> None:
    params = GuidanceParams(eta=0.2, critic="a@1", candidates=4, min_prob=0.1, tail="keep", method="cd", id=7)
    assert GuidanceParams.from_extra_args({"kv_transfer_params": 1, **params.to_extra_args()}) == params
    assert GuidanceParams.from_extra_args({"kv_transfer_params": 1}) is None
    assert GuidanceParams.from_extra_args(None) is None
    assert GuidanceParams(eta=0.2).to_extra_args() == {"qsharp_eta": 0.2}


@pytest.mark.parametrize("eta", [0, -1, 0.0, 1e-7, 1e7, float("nan"), float("inf"), "0.1", True, [0.1]])
def test_wrong_eta_is_refused(eta: Any) -> None:
    with pytest.raises(GuidanceError, match="eta must be a number from 1e-06 to 1e\\+06") as caught:
        GuidanceParams.from_extra_args({"qsharp_eta": eta})
    assert caught.value.param == "eta"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("candidates", 0), ("candidates", 257), ("candidates", 3.0), ("candidates", True), ("min_prob", -0.1),
        ("min_prob", 1.1), ("min_prob", "0"), ("tail", "cut"), ("method", "dpo"), ("critic", 3), ("id", -1),
        ("tial", 1), ("report_candidates", 1),
        *((budget, value) for budget in ("kl_total", "kl_token") for value in (0, -1.0, 1e-7, 1e7, "2", True)),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(field: str, value: Any) -> None:
    with pytest.raises(GuidanceError, match=field):
        GuidanceParams.from_extra_args({"qsharp_eta": 0.1, f"qsharp_{field}": value})


def test_a_budget_for_all_tokens_needs_an_id() -> None:
    assert GuidanceParams.from_extra_args({"qsharp_eta": 0.1, "qsharp_id": 3, "qsharp_kl_total": 2}) is not None
    assert GuidanceParams.from_extra_args({"qsharp_eta": 0.1, "qsharp_kl_token": 2}) is not None
    with pytest.raises(GuidanceError, match="qsharp_id"):
        GuidanceParams.from_extra_args({"qsharp_eta": 0.1, "qsharp_kl_total": 2})


def test_fields_without_eta_are_refused() -> None:
    with pytest.raises(GuidanceError, match="qsharp_eta"):
        GuidanceParams.from_extra_args({"qsharp_tail": "keep"})


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_are_refused_where_they_follow_guidance(penalty: str) -> None:
    params = SamplingParams(extra_args={"qsharp_eta": 0.1}, **{penalty: 1.5})
    with pytest.raises(GuidanceError, match=penalty):
        check_sampling_params(params, penalties_first=False)
    assert check_sampling_params(params, penalties_first=True) == GuidanceParams(eta=0.1)
    assert check_sampling_params(SamplingParams(**{penalty: 1.5}), penalties_first=False) is None


def test_an_id_names_one_sample() -> None:
    with pytest.raises(GuidanceError, match="n > 1"):
        check_sampling_params(
            SamplingParams(n=2, extra_args={"qsharp_eta": 0.1, "qsharp_id": 5}), penalties_first=False
        )
