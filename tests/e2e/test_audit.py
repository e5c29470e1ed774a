"""A running server finds out that its critic's cache is wrong, and makes it right."""

import random
import time

import httpx
import pytest

from tests.conftest import Server
from tests.e2e.test_exact import check, metric, prompt_ids

NAMES = ("qsharp_audit_failures_total", "qsharp_audited_rows_total", "qsharp_audit_error_count")


def counts(server: Server) -> dict[str, float]:
    """As soon as nothing more comes: audits end after the request whose rows they are of."""
    before = None
    while True:
        httpx.get(f"{server.url}/liveness").raise_for_status()  # has the worker report what it has found meanwhile
        time.sleep(1)
        found = {name: metric(server, name) for name in NAMES}
        if found == before:
            return found
        before = found


@pytest.mark.parametrize("critic", ["plain", "fast"])
def test_a_spoilt_slot_is_found_and_healed(server: Server, critic: str) -> None:
    rng = random.Random(critic)
    prompt = [*prompt_ids(rng, 30), *(rng.randrange(3, 190) for _ in range(40))]
    body = {
        "model": "tiny", "prompt": prompt, "eta": 0.1, "max_tokens": 30, "ignore_eos": True, "seed": 1,
        "temperature": 1.0, "n": 1, "guidance": {"critic": critic, "detail": "tokens", "min_prob": 0},
    }  # fmt: skip
    before = counts(server)
    flag = server.root / "fault"
    flag.touch()
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).json()
    assert not flag.exists(), "the slot was to be spoilt while this request ran"
    after = counts(server)
    assert all(after[name] > before[name] for name in NAMES)
    with pytest.raises(AssertionError):
        check(server, body, answer["choices"][0]["guidance"])
    said = [line for line in server.log.read_text().splitlines() if f"audit of critic {critic}@1" in line]
    assert f"tokens=[{', '.join(map(str, prompt[:5]))}" in said[-1]
    assert "cached=[[" in said[-1]

    # The spoilt block was shared: whoever has this prompt would get it, too.
    healed = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).json()
    assert check(server, body, healed["choices"][0]["guidance"]) > 20
    assert counts(server)[NAMES[0]] == after[NAMES[0]]
