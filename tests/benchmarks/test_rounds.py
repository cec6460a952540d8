"""Who is measured when, and what becomes of those who fail. No server is started here."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.model import (
    BenchmarkFailed,
    Filling,
    LeftOut,
    Need,
    Row,
    Sample,
    Stage,
    Transport,
    Unit,
)
from benchmarks.peers import Peer
from benchmarks.progress import Progress
from benchmarks.results import Results
from benchmarks.rounds import Plan, Runner
from benchmarks.scale import QUICK
from benchmarks.server import Server
from benchmarks.tools import Tools
from tests.benchmarks import made_up
from tests.children import Children

STAGE = Stage(name="test", size=1 << 20, filling=Filling.NOTHING)


class Idle(Server):
    """A server that is only said to run."""

    def create(self, stage: Stage) -> None:
        if self.directory.name == "unfit":
            raise BenchmarkFailed("cannot make its disk")
        if self.directory.name == "unmade":
            raise KeyboardInterrupt

    def start(self, transport: Transport) -> float:
        return 0.0

    def close(self) -> None:
        super().close()
        if self.directory.name in ("stuck", "unmade"):
            raise BenchmarkFailed("does not end")

    def command(self, transport: Transport) -> Sequence[str]:
        return []

    def files(self) -> list[Path]:
        return []


def peer(name: str, **lacks: str) -> Peer:
    return Peer(name, Idle, (), name, (), {Need[need]: why for need, why in lacks.items()})


class Turns:
    """Notes who is measured, and for how long; what peers do may be in their names.

    One called "weak" fails in its second turn; amid the turn of others Ctrl-C is pressed.
    """

    def __init__(self) -> None:
        self.taken: list[tuple[str, float]] = []

    def __call__(self, server: Server, stage: Stage, tools: Tools) -> Sample:
        name = server.directory.name
        if name == "weak" and name in self.names():
            raise BenchmarkFailed("had enough")
        if name == "absent":
            raise LeftOut("no such thing here")
        if name == "interrupted":
            raise KeyboardInterrupt
        if name == "still-mounted":
            try:
                raise KeyboardInterrupt
            finally:
                raise BenchmarkFailed("cannot be unmounted")
        self.taken.append((name, tools.runtime_s))
        return Sample(float(len(self.taken)))

    def names(self) -> str:
        return " ".join(name for name, _ in self.taken)


def row(
    turns: Turns,
    name: str = "row",
    *,
    warms_up: bool = False,
    needs: Sequence[Need] = (),
    size: int = STAGE.size,
) -> Row:
    return Row(
        name=name,
        group="test",
        question="Who?",
        unit=Unit.IOPS,
        stage=dataclasses.replace(STAGE, size=size),
        measure=turns,
        warms_up=warms_up,
        needs=frozenset(needs),
    )


@pytest.fixture
def results() -> Results:
    return made_up.run()


def run(
    children: Children, results: Results, rows: Sequence[Row], peers: Sequence[Peer], rounds: int
) -> str:
    """Run a plan; return what was told meanwhile."""
    directory = children.directory / "work"
    directory.mkdir()
    tools = Tools(children, directory, QUICK, QUICK.runtime_s, directory)
    out = io.StringIO()
    plan = Plan(rows, peers, rounds, directory, QUICK.warm_up_s)
    Runner(plan, results, tools, directory, Progress(out), lambda: None).run()
    assert list(directory.iterdir()) == []
    return out.getvalue()


def test_peers_take_turns_within_each_round(children: Children, results: Results) -> None:
    turns = Turns()
    run(children, results, [row(turns)], [peer("a"), peer("b"), peer("c")], 3)
    assert turns.names() == "a b c b c a c a b"
    assert {name: len(found) for name, found in results.rows[0].samples.items()} == {
        **{"a": 3, "b": 3, "c": 3}
    }


def test_a_warm_up_is_short_and_does_not_count(children: Children, results: Results) -> None:
    turns = Turns()
    run(children, results, [row(turns, warms_up=True)], [peer("a")], 2)
    assert [runtime_s for _, runtime_s in turns.taken] == [
        *(QUICK.warm_up_s, QUICK.runtime_s, QUICK.runtime_s)
    ]
    assert [sample.value for sample in results.rows[0].samples["a"]] == [2.0, 3.0]


def test_who_fails_is_not_measured_again_and_the_others_go_on(
    children: Children, results: Results
) -> None:
    turns = Turns()
    told = run(children, results, [row(turns)], [peer("weak"), peer("strong")], 3)
    assert results.rows[0].failed == {"weak": "had enough"}
    assert len(results.rows[0].samples["strong"]) == 3
    assert results.n_failed() == 1
    assert "weak failed: had enough" in told


def test_who_cannot_be_prepared_fails_in_all_rows_of_the_stage(
    children: Children, results: Results
) -> None:
    turns = Turns()
    rows = [row(turns, "first"), row(turns, "second")]
    run(children, results, rows, [peer("unfit"), peer("fit")], 1)
    assert [result.failed for result in results.rows] == [{"unfit": "cannot make its disk"}] * 2
    assert turns.names() == "fit fit"


def test_a_stage_of_which_all_have_failed_is_gone_through(
    children: Children, results: Results
) -> None:
    told = run(children, results, [row(Turns())], [peer("unfit")], 2)
    assert results.n_failed() == 1
    assert "unfit failed: cannot make its disk" in told
    assert "row [op/s]  failed" in told


def test_a_server_that_does_not_end_ends_its_stage_but_not_the_run(
    children: Children, results: Results
) -> None:
    turns = Turns()
    rows = [row(turns, "first"), row(turns, "second", size=2 << 20)]
    told = run(children, results, rows, [peer("stuck"), peer("other")], 1)
    assert turns.names() == "stuck other stuck other"
    assert told.count("failed: does not end") == 2
    assert [set(result.samples) for result in results.rows] == [{"stuck", "other"}] * 2


@pytest.mark.parametrize(
    "names", [("unmade",), ("still-mounted",), ("stuck", "interrupted")], ids=" ".join
)
def test_what_fails_while_a_run_is_broken_off_does_not_let_it_go_on(
    children: Children, results: Results, names: Sequence[str]
) -> None:
    turns = Turns()
    rows = [row(turns, "first"), row(turns, "second", size=2 << 20)]
    with pytest.raises(KeyboardInterrupt):
        run(children, results, rows, [*map(peer, names), peer("other")], 1)
    assert turns.names() in ("", "stuck")


def test_who_lacks_something_is_left_out_of_that_row_alone(
    children: Children, results: Results
) -> None:
    turns = Turns()
    rows = [row(turns, "trim", needs=[Need.TRIM]), row(turns, "other")]
    run(children, results, rows, [peer("a"), peer("b", TRIM="never trims")], 1)
    assert results.rows[0].left_out == {"b": "never trims"}
    assert set(results.rows[0].samples) == {"a"}
    assert set(results.rows[1].samples) == {"a", "b"}


def test_what_turns_out_to_be_impossible_is_left_out(children: Children, results: Results) -> None:
    run(children, results, [row(Turns())], [peer("a"), peer("absent")], 2)
    assert results.rows[0].left_out == {"absent": "no such thing here"}
    assert results.n_failed() == 0


def test_a_stage_that_is_larger_than_the_disk_is_left_out(
    children: Children, results: Results
) -> None:
    large = Stage(name="large", size=1 << 60)
    found = Row(name="row", group="g", question="?", unit=Unit.IOPS, stage=large, measure=Turns())
    run(children, results, [found], [peer("a")], 1)
    assert "of free disk" in results.rows[0].left_out["a"]
