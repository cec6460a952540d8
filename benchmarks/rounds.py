"""All rows, all rounds, all peers, in turns.

For each stage the servers of all peers run side by side, idle but for the one that is being
measured. A row's rounds follow each other; within each round every peer is measured once, and each
round begins with another peer, so that what changes on the machine meanwhile (its clock, its
neighbours, its disk) meets all of them. After each sample what is dirty is written out, so that
nobody is measured while another one's data goes to disk.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks import credentials, machine, page_cache
from benchmarks.bed import bed
from benchmarks.model import Filling, LeftOut, Need, Row, Stage, Transport
from benchmarks.peers import Peer
from benchmarks.progress import Progress
from benchmarks.results import Results, RowResult, row_result
from benchmarks.server import Server
from benchmarks.tools import FAULTS, Tools, end_if_interrupted, told
from nbdstore.sizes import format_size

Item = TypeVar("Item")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        directory: on the disk to measure on; disks of a stage are made in it and removed.
        warm_up_s: of the run before a row's first sample.
    """

    rows: Sequence[Row]
    peers: Sequence[Peer]
    rounds: int
    directory: Path
    warm_up_s: float

    def stages(self) -> dict[Stage, list[Row]]:
        """Rows by stage, in order."""
        found: dict[Stage, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.stage, []).append(row)
        return found

    def row_s(self, row: Row, n_peers: int, runtime_s: float) -> float:
        """About how long a row takes."""
        samples_s = self.rounds * (row.cost_s + (runtime_s if row.is_timed else 0))
        warm_up_s = row.cost_s + self.warm_up_s if row.warms_up and self.warm_up_s else 0
        return n_peers * (samples_s + warm_up_s)

    def preparing_s(self, stage: Stage, n_peers: int) -> float:
        """About how long it takes to prepare a stage, and to remove what was made for it.

        500 MB/s; 30,000 overwrites a second; 10,000 blocks that lie alone, half of which is to
        remove them: a filesystem that discards what it frees tells the disk of each of them.
        """
        is_scattered = stage.filling is Filling.SCATTERED
        written_s = stage.n_scattered / 10e3 if is_scattered else stage.written_bytes / 500e6
        aging_s = stage.aging_writes / 30e3 + stage.n_snapshots / 25
        return n_peers * (1 + written_s + aging_s + 0.002 * stage.n_volumes)

    def takes_s(self, runtime_s: float) -> float:
        """About how long everything takes."""
        total_s = 0.0
        for stage, rows in self.stages().items():
            counts = [len(self.able(row)) for row in rows]
            total_s += self.preparing_s(stage, max(counts))
            total_s += sum(map(self.row_s, rows, counts, itertools.repeat(runtime_s)))
        return total_s

    def able(self, row: Row) -> list[Peer]:
        """The peers that can be measured in a row."""
        return [peer for peer in self.peers if why_left_out(row, peer) is None]


def rotated(items: Sequence[Item], n: int) -> list[Item]:
    """The items, from the n-th on and round; none of none."""
    start = n % len(items) if items else 0
    return [*items[start:], *items[:start]]


def describe(stage: Stage) -> str:
    """A stage in words."""
    volumes = "a volume" if stage.n_volumes == 1 else f"{stage.n_volumes:,} volumes"
    words = [f"{volumes} of {format_size(stage.size)}", stage.filling.value]
    if stage.filled_bytes:
        words[-1] = f"{stage.n_scattered:,} {words[-1]}"
    if stage.aging_writes:
        words.append(f"then {stage.aging_writes:,} random overwrites of 4 KiB")
    if stage.n_snapshots:
        words.append(f"with {stage.n_snapshots} snapshots")
    words.append(f"over {stage.transport.value}")
    return ", ".join(words)


class Runner:
    """Measures a plan.

    Arguments:
        results: gets each row as it is begun, so that an interrupted run leaves what it has.
        save: called after each row.
    """

    def __init__(
        self,
        plan: Plan,
        results: Results,
        tools: Tools,
        credentials_directory: Path,
        progress: Progress,
        save: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._results = results
        self._tools = tools
        self._credentials = credentials_directory
        self._progress = progress
        self._save = save

    def run(self) -> None:
        """Measure everything."""
        self._progress.begin(self._plan.takes_s(self._tools.runtime_s))
        for number, (stage, rows) in enumerate(self._plan.stages().items()):
            self._stage(number, stage, [(row, self._begin(row)) for row in rows])

    def _begin(self, row: Row) -> RowResult:
        """A row's result, in which those who cannot be measured are named."""
        result = row_result(row, describe(row.stage))
        for peer in self._plan.peers:
            if reason := why_left_out(row, peer):
                result.left_out[peer.name] = reason
        return result

    def _stage(self, number: int, stage: Stage, rows: Sequence[tuple[Row, RowResult]]) -> None:
        results = [result for _, result in rows]
        peers = [
            peer
            for peer in self._plan.peers
            if any(peer.name not in result.left_out for result in results)
        ]

        def failed(peer: Peer, reason: str) -> None:
            self._progress.say(f"{peer.name} failed: {reason}")
            for result in results:
                if peer.name not in result.left_out:
                    result.failed[peer.name] = reason

        directory = self._plan.directory / f"stage-{number}"
        try:
            if peers:
                self._progress.stage(describe(stage))
                with bed(stage, peers, directory, self._credentials, self._tools, failed) as beds:
                    self._progress.advance(self._plan.preparing_s(stage, len(peers)))
                    for index, (row, result) in enumerate(rows):
                        self._row(index, row, result, beds)
        except LeftOut as reason:
            self._progress.say(f"left out: {reason}")
            for result in results:
                result.left_out |= {peer.name: str(reason) for peer in peers}
        except FAULTS as error:
            # Not one peer's part: what all servers need, or to stop and remove one of them.
            self._progress.say(f"failed: {told(error)}")
            end_if_interrupted(error)
            for result in results:
                for peer in peers:
                    if peer.name not in {**result.left_out, **result.samples, **result.failed}:
                        result.failed[peer.name] = told(error)
        self._results.rows += [result for result in results if result not in self._results.rows]
        self._save()

    def _row(self, index: int, row: Row, result: RowResult, servers: dict[str, Server]) -> None:
        self._results.rows.append(result)
        names = [name for name in servers if name not in result.left_out]
        for number in range(self._plan.rounds):
            for name in rotated(names, index + number):
                if name in result.left_out or name in result.failed:
                    continue
                self._progress.sample(f"{row.name}, round {number + 1}: {name}")
                self._sample(row, result, name, servers[name], is_first=number == 0)
        self._progress.row(result)
        planned = len(self._plan.able(row))
        self._progress.advance(self._plan.row_s(row, planned, self._tools.runtime_s))
        self._save()

    def _sample(
        self, row: Row, result: RowResult, name: str, server: Server, *, is_first: bool
    ) -> None:
        """Measure one peer once; what goes wrong is noted with the row."""
        tools = self._tools
        try:
            if is_first and row.warms_up and tools.scale.warm_up_s:
                shorter = dataclasses.replace(tools, runtime_s=tools.scale.warm_up_s)
                row.measure(server, row.stage, shorter)
            result.add(name, row.measure(server, row.stage, tools))
            page_cache.sync(server.files())
        except LeftOut as reason:
            result.left_out[name] = str(reason)
        except FAULTS as error:
            result.failed[name] = told(error)
            self._progress.say(f"{row.name}: {name} failed: {told(error)}")
            end_if_interrupted(error)


def why_left_out(row: Row, peer: Peer) -> str | None:
    """Say why a peer cannot be measured in a row; None if it can."""
    for name in (*peer.programs, *row.needs_host):
        if reason := machine.why_missing(name):
            return reason
    for need in Need:
        if need in row.needs and need in peer.lacks:
            return peer.lacks[need]
    return credentials.why_missing() if row.stage.transport is Transport.TLS else None
