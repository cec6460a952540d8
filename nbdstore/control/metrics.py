"""Metrics in Prometheus' text format: what a pool and its volumes do, in numbers.

Owns the names and the text. The text is written here, not by a client library: it is a page of
code, and the numbers exist already, so that a library's own registry would only be in the way.
What is counted since the server started is a counter; the rest is a gauge. The number of series is
bounded by the number of volumes and snapshots: each has one per command that was used, times the
buckets, and one per kind of error that was met.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nbdstore.control.contracts import MeasuresLike
from nbdstore.control.model import VolumeInfo

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("ok", "warning", "full", "failed")

_POOL_GAUGES = {
    "capacity": ("capacity_bytes", "What the pool may hold."),
    "used": ("used_bytes", "Blocks that hold data or the pool's own maps."),
    "reserved": ("reserved_bytes", "Set aside, by volumes and for trim and delete."),
    "reclaimable": ("reclaimable_bytes", "Freed, and usable again after the next sync."),
    "free": ("free_bytes", "Not in use."),
    "fill": ("fill_ratio", "Share of the capacity that is taken, 0 to 1."),
    "provisioned": ("provisioned_bytes", "Sizes of all volumes together."),
    "mapped": ("mapped_bytes", "What all volumes hold together."),
    "volumes": ("volumes", "Number of volumes."),
    "held_writes": ("held_writes", "Writes that wait for space now."),
    "unsynced": ("unsynced_bytes", "Data that is in the page cache only."),
    "map_memory": ("map_memory_bytes", "Memory that the maps of volumes take."),
    "allocated_on_host": ("allocated_on_host_bytes", "What the pool takes of its filesystem."),
    "free_on_host": ("free_on_host_bytes", "What the filesystem under the pool has left."),
}
_POOL_COUNTERS = {
    "corruptions": ("corruptions_total", "How often a damaged block was met."),
    "checkpoints": ("checkpoints_total", "Checkpoints written."),
}
_JOURNAL_GAUGES = {
    "size": ("journal_size_bytes", "Room in the journal."),
    "used": ("journal_used_bytes", "What the next start would replay, were there no checkpoint."),
}


class Page:
    """The text, a metric at a time."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(
        self,
        name: str,
        kind: str,
        help_text: str,
        samples: Iterable[tuple[str, Mapping[str, str], float]],
    ) -> None:
        """Add a metric with its samples: (suffix of the name, labels, value)."""
        lines = [_sample(f"nbdstore_{name}{suffix}", labels, n) for suffix, labels, n in samples]
        if lines:
            self._lines.append(f"# HELP nbdstore_{name} {help_text}")
            self._lines.append(f"# TYPE nbdstore_{name} {kind}")
            self._lines += lines

    def text(self) -> str:
        """Return the whole page."""
        return "\n".join([*self._lines, ""])


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inner = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{inner}}} {value!r}" if inner else f"{name} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def page(
    version: str,
    status: Mapping[str, Any],
    volumes: Iterable[VolumeInfo],
    measures: Iterable[MeasuresLike],
) -> str:
    """Return the metrics of a pool (its status), its volumes, and what clients did to them."""
    out = Page()
    out.add("info", "gauge", "The server.", [("", {"version": version}, 1)])
    _add_pool(out, status)
    _add_volumes(out, list(volumes))
    _add_measures(out, list(measures))
    return out.text()


def _add_pool(out: Page, status: Mapping[str, Any]) -> None:
    for source, kind, metrics in (
        (status, "gauge", _POOL_GAUGES),
        (status, "counter", _POOL_COUNTERS),
        (status["journal"], "gauge", _JOURNAL_GAUGES),
    ):
        for key, (name, help_text) in metrics.items():
            if key in source:
                out.add(f"pool_{name}", kind, help_text, [("", {}, source[key])])
    if "syncs" in status["journal"]:
        help_text = "Syncs of the journal: each makes durable what waits for it."
        out.add("pool_syncs_total", "counter", help_text, [("", {}, status["journal"]["syncs"])])
    states = [("", {"state": state}, int(status["state"] == state)) for state in STATES]
    out.add("pool_state", "gauge", "1 for the state the pool is in, else 0.", states)


def _add_volumes(out: Page, volumes: list[VolumeInfo]) -> None:
    for name, help_text in (
        ("size", "What clients see."),
        ("mapped", "What the volume holds."),
        ("reserved", "Space that is set aside for the volume."),
    ):
        samples = [("", {"volume": info.name}, getattr(info, name)) for info in volumes]
        out.add(f"volume_{name}_bytes", "gauge", help_text, samples)
    damaged = [("", {"volume": info.name}, info.scrub_damaged) for info in volumes]
    out.add("volume_scrub_damaged", "gauge", "Damaged blocks that the last scrub found.", damaged)


def _add_measures(out: Page, measures: list[MeasuresLike]) -> None:
    each = [({"volume": item.name}, item) for item in measures]
    help_text = "Requests from when they were read to when their reply was sent or queued."
    samples = [sample for labels, item in each for sample in _latencies(labels, item)]
    out.add("volume_request_seconds", "histogram", help_text, samples)
    for name, kind, help_text in (
        ("bytes_read", "counter", "Bytes that clients read."),
        ("bytes_written", "counter", "Bytes that clients wrote."),
        ("in_flight", "gauge", "Requests that are not answered yet."),
        ("connections", "gauge", "Clients that have it attached."),
    ):
        suffix = "_total" if kind == "counter" else ""
        values = [("", labels, getattr(item, name)) for labels, item in each]
        out.add(f"volume_{name}{suffix}", kind, help_text, values)
    errors = [
        ("", labels | {"error": error}, n)
        for labels, item in each
        for error, n in item.errors.items()
    ]
    out.add("volume_errors_total", "counter", "Replies that were errors.", errors)


def _latencies(
    labels: dict[str, str], item: MeasuresLike
) -> Iterator[tuple[str, dict[str, str], float]]:
    for latency in item.latencies:
        of_command = labels | {"command": latency.command}
        for bound_s, n in latency.buckets:
            yield "_bucket", of_command | {"le": f"{bound_s:.9g}"}, n
        yield "_bucket", of_command | {"le": "+Inf"}, latency.n_requests
        yield "_sum", of_command, latency.sum_s
        yield "_count", of_command, latency.n_requests
