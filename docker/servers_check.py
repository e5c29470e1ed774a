"""Two servers behind one port, as compose.scale.yaml has them: the part of `compose_check.py` that is about several."""

import json
import time
from typing import Any

from compose_stack import HERE, Stack, docker, succeeds
from http_check import LEARNED, Api, check, say, traffic, wait_for

CLIENTS = 4
WITHIN = 5.0  # seconds that a decision may take to reach all servers
COPY = "copy"  # number of the version that is a copy of what the trainer learned
ASK = """
import pathlib, urllib.request
key = pathlib.Path("/run/secrets/vllm_api_key").read_text().strip()
request = urllib.request.Request("http://127.0.0.1:8000/v1/critics", headers={"Authorization": f"Bearer {key}"})
print(urllib.request.urlopen(request).read().decode())
"""
PUBLISH = """
import json, pathlib, shutil, sys
learned, copy = map(pathlib.Path, sys.argv[1:])
shutil.copytree(learned, copy)
card = json.loads((copy / "critic.json").read_text())
(copy / "critic.json").write_text(json.dumps({**card, "version": copy.name}))
"""


def several(stack: Stack, api: Api, admin: Api, services: list[str]) -> None:
    """What is decided reaches both; one that is killed loses nothing that was answered, and comes back right."""
    stack.add(HERE / "compose.scale.yaml")
    stack.up(*services, "balancer")
    learned = active(stack, 1)
    check(
        bool(learned) and active(stack, 2) == learned,
        f"two servers are ready behind the balancer, and both have {LEARNED}@{learned}",
    )
    folder = admin(f"/v1/critics/{LEARNED}")["versions"][0]["path"]
    copy = f"{folder.rpartition('/')[0]}/{COPY}"
    stack.inside("trainer", "python", "-c", PUBLISH, folder, copy)
    admin("/v1/critics", {"path": copy})
    admin(f"/v1/critics/{LEARNED}/activate", {"version": COPY})
    reached(stack, COPY)
    with traffic(api, CLIENTS) as seen:
        wait_for("answers", 120, lambda: len(seen.stored) >= 40)
        check(seen.lost == 0, f"{len(seen.stored) // 2} requests were answered, none failed")
        killed = stack("ps", "-q", "server", quiet=True).splitlines()[1]
        succeeds("kill", "-s", "SIGKILL", killed)  # an engine does not wait for long until a process is gone
        wait_for("it to be gone", 60, lambda: docker("inspect", "-f", "{{.State.Running}}", killed) == "false")
        before = len(seen.stored)
        wait_for("answers of the other server", 120, lambda: len(seen.stored) >= before + 40)
    # What it had on its way, and what was sent to it until the balancer knew.
    check(seen.lost <= 2 * CLIENTS, f"after SIGKILL of one server the other answers; {seen.lost} requests were lost")
    found = stack.stored(seen.stored)
    check(found == len(seen.stored), f"all {found} answered rollouts are in PostgreSQL")
    admin(f"/v1/critics/{LEARNED}/rollback", {})
    stack.up(*services, "balancer")
    check(active(stack, 1) == active(stack, 2) == learned, "it comes back with what was rolled back meanwhile")
    admin(f"/v1/critics/{LEARNED}/activate", {"version": COPY})
    reached(stack, COPY)
    admin(f"/v1/critics/{LEARNED}/rollback", {})
    reached(stack, learned)


def active(stack: Stack, number: int) -> str:
    """The version that the server of this number guides with."""
    critics: list[dict[str, Any]] = json.loads(stack.inside("server", "python", "-c", ASK, number=number))["data"]
    return next((str(one["version"]) for one in critics if one["name"] == LEARNED and one["active"]), "")


def reached(stack: Stack, version: str) -> None:
    """Waits until both servers guide with this version."""
    begun = time.monotonic()
    wait_for(f"{version} everywhere", WITHIN, lambda: active(stack, 1) == active(stack, 2) == version, pause=0.1)
    say(f"ok: {LEARNED}@{version} is active at both servers {time.monotonic() - begun:.1f} s after it was decided")
