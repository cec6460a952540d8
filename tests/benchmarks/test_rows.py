"""The list of rows is in order."""

from __future__ import annotations

import pytest

from benchmarks import fio
from benchmarks.cold import ColdJob
from benchmarks.kernel import KernelJob
from benchmarks.model import Need, Stage
from benchmarks.peers import PEERS
from benchmarks.rounds import Plan, describe, rotated
from benchmarks.rows import chosen, rows
from benchmarks.scale import NORMAL, SCALES, SMOKE, Scale

JOBS = (fio.FioJob, ColdJob, KernelJob)
each_scale = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())


@each_scale
def test_names_are_unique(scale: Scale) -> None:
    names = [row.name for row in rows(scale)]
    assert len(names) == len(set(names))


@each_scale
def test_a_goal_names_a_row_that_is_measured_before(scale: Scale) -> None:
    seen: set[str] = set()
    for row in rows(scale):
        assert row.goal is None or row.goal.baseline is None or row.goal.baseline in seen
        seen.add(row.name)


@each_scale
def test_on_each_stage_reads_come_before_writes(scale: Scale) -> None:
    writes: set[Stage] = set()
    for row in rows(scale):
        if "read" in row.name or row.name == "nbdcopy-out":
            assert row.stage not in writes or row.name.startswith("random-mixed"), row.name
        if "write" in row.name:
            writes.add(row.stage)


def test_a_job_of_fio_has_the_goal_of_its_kind_wherever_it_is_measured() -> None:
    kinds = set()
    for row in rows(NORMAL):
        if row.goal is None or row.goal.baseline or not isinstance(row.measure, JOBS):
            continue
        kind = goal_of_its_kind(row.measure.job)
        assert row.goal.ratio == kind, row.name
        kinds.add(kind)
    assert kinds == {1, 1.5, 2, 3}


def goal_of_its_kind(job: str) -> float:
    """What the options of a job want: one client or several, how many requests in flight."""
    lines = fio.job_text(job, {}).splitlines()
    options = dict(line.split("=", 1) for line in lines if "=" in line)
    if "fsync" in options:
        return 2 if "numjobs" in options else 1
    is_deep = int(options["iodepth"]) >= 32
    return {"randread": 1.5, "randwrite": 3}.get(options["rw"], 1) if is_deep else 1


def test_only_rows_without_peers_have_no_goal() -> None:
    for row in rows(NORMAL):
        alone = all(row.needs & peer.lacks.keys() for peer in PEERS.values() if peer.lacks)
        assert (row.goal is None) is alone, row.name


def test_every_job_is_used() -> None:
    used = {row.measure.job for row in rows(SMOKE) if isinstance(row.measure, fio.FioJob)}
    others = {"age", "fill-in-order", "fill-scattered", "trim-all"}
    assert used | others == {path.stem for path in fio.JOBS.glob("*.fio")}


def test_rows_are_chosen_by_name_pattern_and_group() -> None:
    everything = rows(NORMAL)

    def names(*patterns: str) -> list[str]:
        return [row.name for row in chosen(everything, patterns)]

    assert names("trim-1t") == ["trim-1t"]
    assert names("cold-sequential-*", "trim-1t") == [
        *("cold-sequential-read-128k", "cold-sequential-read-1m", "trim-1t"),
    ]
    assert set(names("fsync")) == {"fsync-each-write", "fsync-every-32", "fsync-8-clients"}
    assert names() == [row.name for row in everything]
    with pytest.raises(LookupError, match="no-such-row"):
        names("no-such-row")


@pytest.mark.requires("nbdkit", "qemu-nbd", "qemu-img", "nbd-server")
def test_the_daily_rows_take_under_three_minutes() -> None:
    scale = SCALES["quick"]
    daily = [row for row in rows(scale) if row.is_quick]
    plan = Plan(daily, list(PEERS.values()), scale.rounds, fio.JOBS, scale.warm_up_s)
    assert 60 < plan.takes_s(scale.runtime_s) < 170


def test_every_peer_says_what_it_lacks() -> None:
    assert not PEERS["nbdstore"].lacks
    for name, peer in PEERS.items():
        assert name == "nbdstore" or Need.JOURNAL in peer.lacks


def test_each_round_begins_with_another_peer() -> None:
    assert [rotated("abc", n) for n in range(4)] == [
        *(["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]),
    ]


def test_a_stage_is_told_in_words() -> None:
    found = {row.name: describe(row.stage) for row in rows(NORMAL)}
    assert found["aged-fsync-each-write"] == (
        "a volume of 1 GiB, written once, in order, "
        "then 360,000 random overwrites of 4 KiB, over a unix socket"
    )
    assert found["open-1000-volumes"].startswith("1,000 volumes of 1 GiB, 1,024 blocks of 4 KiB")
