"""The ratios that the documentation quotes are what it says they are."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.guidance import render, tables

AT: dict[str, Any] = {"pair": "tiny", "rows": 32, "tokens": 10, "min_prob": 0.0, "prompts": "alike"}
SERVED: dict[str, Any] = {"candidates": 20, "min_prob": 0.01, "prompts": "task"}


def wave(side: str, head: str | None, seconds: list[float], **fields: Any) -> dict[str, Any]:
    return {**AT, "side": side, "head": head, "candidates": 8 if head else 0, "seconds": seconds, **fields}


RESULT: dict[str, Any] = {
    "throughput": [
        # prompts of their own, which only their own line may be of
        wave("ours", "V", [8.0, 8.0, 8.0], prompts="apart"),
        wave("ours", None, [6.0, 6.0, 6.0], prompts="apart"),
        wave("ours", None, [1.0, 2.0, 3.0]),
        wave("vllm", None, [0.9, 1.9, 3.3]),
        wave("ours", "V", [4.0, 2.5, 9.0]),
        wave("bare", "V", [1.0, 1.2, 1.1]),
        wave("ours", "native", [1.25, 2.0, 4.0], candidates=20),
        # a slow peer's waves may be shorter: 4 tokens in 8 s are 16 tokens per second of 32 rows
        wave("generate", "V", [8.0, 7.0, 9.0], tokens=4, batch=8, threads=1),
        wave("dense", "V", [12.0, 12.0, 12.0]),
        # as requests are by default
        wave("ours", "V", [5.0, 5.0, 5.0], **SERVED),
        wave("ours", "Q", [4.5, 4.0, 5.0], **SERVED),
        wave("ours", None, [4.0, 4.0, 4.0], prompts="task"),
        wave("generate", "V", [50.0, 50.0, 50.0], batch=4, threads=2, **SERVED),
    ],
    "http": [{"pair": "tiny", "requests": 64, "tokens": 8, "clients": 32, "seconds": {"vllm": [1.0], "ours": [1.25]}}],
}


def cells(table: str, start: str) -> list[str]:
    """The one line that begins so, below the head."""
    (line,) = [line for line in table.splitlines()[2:] if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.replace("*", "").strip("|").split(" | ")]


def test_efficiency() -> None:
    *_, ratio, efficiency = cells(tables.guided(RESULT), "tiny | V | 32 | 8")
    # of rounds: 1 and 1 of 4, 2 and 1.2 of 2.5, 3 and 1.1 of 9
    assert ratio == "0.33 (0.25 to 0.80)"
    assert efficiency == "0.50 (0.46 to 1.28)"


def test_a_critic_without_passes_of_its_own_is_held_to_the_reference_alone() -> None:
    *_, alone, ratio, efficiency = cells(tables.guided(RESULT), "tiny | native | 32 | 20")
    assert alone == "–"
    assert ratio == efficiency == "0.80 (0.75 to 1.00)"


def test_prompts_that_share_nothing_have_a_line_of_their_own() -> None:
    *_, ratio, efficiency = cells(tables.guided(RESULT), "tiny | V | 32, apart | 8")
    assert ratio == "0.75 (0.75 to 0.75)"
    assert efficiency == "0.89 (0.88 to 0.90)"


def test_peers_are_compared_by_tokens_per_second() -> None:
    generate = cells(tables.peers(RESULT), "(a) `generate`, two passes | batches of 8")
    assert generate[1] == "batches of 8, 1 thread"
    assert generate[5].startswith("16.0 ")
    assert generate[6].startswith("80.0 ")
    assert generate[7].startswith("5.0")
    assert cells(tables.peers(RESULT), "(b)")[7].startswith("3.0")


def test_requests_by_default_are_compared_with_each_other() -> None:
    line = cells(tables.peers(RESULT), "(a) `generate`, two passes | batches of 4, 2 threads")
    assert line[3:5] == ["32, task", "20"]
    assert line[7].startswith("10.0")
    assert cells(tables.as_served(RESULT), "tiny | V | 32")[-1] == "0.80 (0.80 to 0.80)"
    assert cells(tables.as_served(RESULT), "tiny | Q | 32")[-1] == "0.89 (0.80 to 1.00)"


def test_losses_are_of_each_round() -> None:
    offline = cells(tables.without_eta(RESULT), "offline")
    assert offline[-1] == "5.0 (-10.0 to 10.0)"
    http = cells(tables.without_eta(RESULT), "HTTP")
    assert http[3].startswith("512.0 ")
    assert http[-1] == "20.0 (20.0 to 20.0)"


def test_a_page_of_what_there_is() -> None:
    """A run of some parts alone can be read, too."""
    machine = {"date": "", "cpu": "", "cores": 2, "memory_gib": 1.0, "platform": "", "python": "", "versions": {}}
    settings = {
        "pairs": ["tiny"],
        "tokens": {"tiny": 10},
        "rounds": 3,
        "latency_tokens": 8,
        "load": 0.5,
        "dtypes": {"tiny": "float32"},
    }
    about = {"command": "x", "minutes": 1.0, "machine": machine, "settings": settings}
    page = render.page({**RESULT, **about})
    assert tables.guided(RESULT) in page
    assert tables.as_served(RESULT) in page
    assert "Q head is random: what it guides to" in page
    asked_v = {**RESULT, "throughput": [c for c in RESULT["throughput"] if c["head"] != "Q" or c["prompts"] != "task"]}
    assert "Q head is random: what it guides to" not in render.page({**asked_v, **about})
    without = {**RESULT, "throughput": [c for c in RESULT["throughput"] if c["prompts"] != "task"]}
    assert "by default" not in render.page({**without, **about})


CAPTURED = [
    {"pair": "tiny", "head": head, "rows": 32, "candidates": 8, "compiled": compiled, "length": 9, "seconds": seconds}
    for head in ("V", "Q")
    for compiled, seconds in ((True, [0.1, 0.2, 0.3]), (False, [0.4, 0.5, 0.6]))
]


def test_a_captured_step_beside_the_waves_of_its_shape() -> None:
    table = tables.captured({**RESULT, "captured": CAPTURED})
    # steps of 10 tokens: 2 s unguided, 4 s guided
    assert cells(table, "tiny | V")[4:] == ["200.00 (100.00 to 300.00)", "500.00 (400.00 to 600.00)", "2.50", "1.00"]
    assert cells(table, "tiny | Q")[-1] == "–"  # its waves were not measured


@pytest.mark.parametrize("more", [{}, {"captured": CAPTURED}])
def test_the_page_of_a_gpu(more: dict[str, Any], tmp_path: Path) -> None:
    machine = {
        "date": "d", "cpu": "c", "cores": 2, "gpu": "G", "memory_gib": 1.0, "platform": "p", "python": "3",
        "versions": {"torch": "2"},
    }  # fmt: skip
    settings = {"pairs": ["large"], "rounds": 3, "tokens": {"large": 10}}
    render.write({**RESULT, **more, "machine": machine, "settings": settings, "command": "m", "minutes": 1.0}, tmp_path)
    page = (tmp_path / "benchmarks-gpu.md").read_text()
    assert "c, 2 cores, G, 1 GiB" in page
    assert ("The critic's step" in page) == ("The last table" in page) == bool(more)
