"""What a server's `/metrics` says."""

import httpx
from prometheus_client.parser import text_string_to_metric_families


async def read_metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """The server's counters and gauges, each summed over its labels; counters without their `_total`."""
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    return {
        family.name: sum(s.value for s in family.samples if s.name in (family.name, family.name + "_total"))
        for family in families
    }
