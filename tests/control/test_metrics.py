"""GET /metrics, as Prometheus' own parser reads it from a served pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from nbdstore.control import metrics
from tests.control.real_pool import Served
from tests.server.nbd_client import NbdClient

MIB = 1 << 20
BLOCK = 4096


class Scraped:
    """The metrics of one scrape, by name and labels."""

    def __init__(self, served: Served) -> None:
        response = served.call("GET", "/metrics")
        assert response.status == 200
        assert response.headers["Content-Type"] == metrics.CONTENT_TYPE
        self.families = list(text_string_to_metric_families(response.content.decode()))
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return float(self.samples[f"nbdstore_{name}", tuple(sorted(labels.items()))])

    def n_series(self) -> int:
        return len(self.samples)


def visit(served: Served, *steps: Callable[[NbdClient], Any]) -> None:
    async def attach() -> None:
        client = await NbdClient.connect(f"unix:{served.nbd_path}")
        await client.go("db")
        for step in steps:
            await step(client)
        client.close()

    served.run(attach())


def write(client: NbdClient) -> Any:
    return client.write(0, b"x" * BLOCK)


def read(client: NbdClient) -> Any:
    return client.read(0, 2 * BLOCK)


def test_the_pool(served: Served) -> None:
    served.client.create_volume("db", 64 * MIB)
    scraped = Scraped(served)
    assert scraped("pool_capacity_bytes") == 1 << 30
    assert scraped("pool_volumes") == 1
    assert scraped("pool_provisioned_bytes") == 64 * MIB
    assert scraped("pool_state", state="ok") == 1
    assert scraped("pool_state", state="failed") == 0
    assert scraped("pool_journal_size_bytes") == MIB
    before = scraped("pool_checkpoints_total")
    served.client.checkpoint()
    assert Scraped(served)("pool_checkpoints_total") == before + 1
    assert scraped("pool_syncs_total") > 0
    assert 0 < scraped("pool_fill_ratio") < 1
    assert scraped("pool_held_writes") == 0


def test_a_volume(served: Served) -> None:
    served.client.create_volume("db", 64 * MIB)
    visit(served, write, write, read)
    visit(served, read)  # counters survive a reconnect
    scraped = Scraped(served)
    assert scraped("volume_mapped_bytes", volume="db") == BLOCK
    assert scraped("volume_size_bytes", volume="db") == 64 * MIB
    assert scraped("volume_bytes_written_total", volume="db") == 2 * BLOCK
    assert scraped("volume_bytes_read_total", volume="db") == 4 * BLOCK
    of_reads = {"volume": "db", "command": "read"}
    assert scraped("volume_request_seconds_count", **of_reads) == 2
    assert scraped("volume_request_seconds_bucket", **of_reads, le="+Inf") == 2
    assert 0 < scraped("volume_request_seconds_sum", **of_reads) < 60
    assert scraped("volume_in_flight", volume="db") == 0


def test_buckets_are_cumulative_and_named_as_the_parser_wants(served: Served) -> None:
    served.client.create_volume("db", 64 * MIB)
    visit(served, write)
    (family,) = (f for f in Scraped(served).families if f.name == "nbdstore_volume_request_seconds")
    assert family.type == "histogram"
    assert family.documentation
    buckets = [s for s in family.samples if s.name.endswith("_bucket")]
    bounds = [float(sample.labels["le"]) for sample in buckets]
    assert bounds == sorted(bounds)
    values = [sample.value for sample in buckets]
    assert values == sorted(values)


def test_the_number_of_series_goes_with_the_volumes(served: Served) -> None:
    before = Scraped(served).n_series()
    served.client.create_volume("db", 64 * MIB)
    for _ in range(5):
        visit(served, write)
    with_one = Scraped(served).n_series()
    for _ in range(5):
        visit(served, write)
    assert Scraped(served).n_series() == with_one
    served.client.delete_volume("db")
    assert Scraped(served).n_series() == before


def test_labels_are_escaped() -> None:
    page = metrics.Page()
    page.add("x", "gauge", "X.", [("", {"volume": 'a"b\\c\nd'}, 1)])
    (family,) = text_string_to_metric_families(page.text())
    assert family.samples[0].labels == {"volume": 'a"b\\c\nd'}
