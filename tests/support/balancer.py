"""HAProxy from Debian's package with the configuration that is shipped, in front of servers on loopback.

Servers are found as in a deployment: by a name that has an address for each of them. They share a port.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.compose import DOCKER
from tests.support.names import NAME, Names, name_server
from tests.support.waiting import within
from trainer.serving import free_port

CONFIGURATION = DOCKER / "haproxy" / "haproxy.cfg"
NOTICED = 20.0  # seconds that it may take on a busy machine to notice what it asks about every second


@dataclass(frozen=True)
class Balancer:
    """A running balancer.

    Attributes:
        url: what clients ask.
        watch: what Prometheus and the health check ask.
        names: where it finds servers.
    """

    url: str
    watch: str
    names: Names

    def ready(self) -> int:
        """How many servers it gives requests to."""
        shown = httpx.get(f"{self.watch}/metrics", params={"scope": "backend"}).text
        (line,) = [line for line in shown.splitlines() if line.startswith("haproxy_backend_active_servers{")]
        return int(line.split()[-1])

    def wait(self, servers: int) -> None:
        """Until it gives requests to so many."""
        within(NOTICED, lambda: self.ready() == servers)


def haproxy() -> str:
    """The program; skips the test where there is none."""
    found = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip("HAProxy is not installed (apt-get install haproxy)")
    return found


@contextmanager
def balancing(hosts: list[str], port: int, log: Path) -> Iterator[Balancer]:
    """Runs it in front of the servers on this port of these addresses."""
    program = haproxy()
    with name_server(hosts) as names, log.open("wb") as output:
        clients, watch = free_port(), free_port()
        settings = {
            "LISTEN": f"127.0.0.1:{clients}",
            "WATCH": f"127.0.0.1:{watch}",
            "SERVERS_AT": f"{NAME}:{port}",
            "DNS": f"127.0.0.1:{names.port}",
        }
        process = subprocess.Popen(
            [program, "-f", str(CONFIGURATION)], env={**os.environ, **settings}, stdout=output, stderr=output
        )
        try:
            balancer = Balancer(f"http://127.0.0.1:{clients}", f"http://127.0.0.1:{watch}", names)
            within(NOTICED, lambda: _listens(balancer, process))
            yield balancer
        finally:
            process.terminate()
            process.wait(10)


def _listens(balancer: Balancer, process: "subprocess.Popen[bytes]") -> bool:
    assert process.poll() is None
    try:
        return httpx.get(f"{balancer.watch}/ready").status_code in (200, 503)
    except httpx.TransportError:
        return False
