"""How fast the playground draws a long answer, and how smoothly its slider moves, in a real Chromium.

    python -m benchmarks.playground

The answer is the default model's: 500 tokens of 20 candidates each. It is sampled once, and the page gets it again and
again, so that nothing but the page is measured: from the last byte of the response until the tokens are painted, and
from frame to frame while every frame moves eta.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Page, Route, sync_playwright
from rich.console import Console

from server.api.playground import FOLDER
from trainer.serving import serve

LOG = Path("runs/playground/log")
REQUEST = {
    "prompt": "Once upon a time",
    "eta": 0.1,
    "guidance": {"candidates": 20, "min_prob": 0, "detail": "candidates"},
    "ignore_eos": True,
    "seed": 0,
    "stream": True,
    "return_token_ids": True,
}
DRAWN = """async (last) => {
    document.querySelector("aside .primary").click();
    while (!document.getElementById(`shown-${last}`)) await new Promise((done) => setTimeout(done, 1));
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    const asked = performance.getEntriesByType("resource").filter(({ name }) => name.endsWith("/v1/completions"));
    return performance.now() - asked.at(-1).responseEnd;
}"""
MOVED = """async () => {
    const slider = document.querySelector("#what-if-eta");
    const set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set;
    const frame = () => new Promise((done) => requestAnimationFrame(done));
    const times = [await frame()];
    for (let i = 0; i < 150; i++) {
        set.call(slider, String(-2 + i * 0.02));
        slider.dispatchEvent(new Event("input", { bubbles: true }));
        times.push(await frame());
    }
    return times.slice(1).map((time, i) => time - times[i]);
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.error("Chromium is not installed (apt-get install chromium)")
    with serve([], LOG) as url:
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        body = {**REQUEST, "model": model, "max_tokens": given.tokens}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=600).raise_for_status().content
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            figures = measured(page, url, answer, given.tokens, given.rounds)
            browser.close()
    report(figures, answer)


def measured(page: Page, url: str, answer: bytes, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds until the answer was drawn, and between frames."""

    def replay(route: Route) -> None:
        route.fulfill(body=answer, content_type="text/event-stream")

    page.route("**/v1/completions", replay)
    drawn, frames = list[float](), list[float]()
    for _ in range(rounds):
        page.goto(f"{url}/playground/")
        page.locator("aside .primary:enabled").wait_for()
        page.locator('aside [name="n"]').fill("1")
        page.get_by_label("The model by itself beside it").uncheck()
        drawn.append(page.evaluate(DRAWN, tokens - 1))
        page.wait_for_timeout(1000)  # the curve over etas is drawn when the rest is
        frames += page.evaluate(MOVED)
    return {"drawn": drawn, "frames": frames}


def report(figures: dict[str, list[float]], answer: bytes) -> None:
    console = Console()
    guidance = [json.loads(line[6:]) for line in answer.decode().splitlines() if line.startswith("data: {")]
    last: Any = next(c for chunk in guidance for c in chunk["choices"] if "guidance" in c)["guidance"]
    asked = [token for token in last["tokens"] if token["candidates"]]
    counts = [len(token["candidates"]["token_ids"]) for token in asked]
    page = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    console.print(f"{len(last['tokens'])} tokens, {statistics.fmean(counts):.1f} candidates each")
    console.print(f"response {len(answer) / 1000:.0f} KB, page {page / 1000:.0f} KB")
    for name, values in figures.items():
        ordered = sorted(values)
        middle, late = statistics.median(ordered), ordered[int(0.95 * (len(ordered) - 1))]
        console.print(f"{name}: median {middle:.0f} ms, 95 % within {late:.0f} ms, n = {len(ordered)}")


if __name__ == "__main__":
    main()
