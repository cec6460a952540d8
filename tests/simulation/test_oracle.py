"""The oracle of concurrent requests: what it lets pass, and what it does not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simulation.oracle import (
    CELL,
    Effect,
    History,
    Stamps,
    Wrong,
    content,
    stamp,
    stamps_of,
    zero_stamps,
)

N_CELLS = 32


class Volume:
    """A history, and what may be asked of it, told in few words; each call is one event."""

    def __init__(self) -> None:
        self.history = History(zero_stamps(N_CELLS))
        self.now = 0

    def tick(self) -> int:
        self.now += 1
        return self.now

    def send(self, serial: int, first: int = 0, stop: int = 8, *, whole: bool = True) -> Effect:
        effect = Effect(serial, first, stop, self.tick(), whole=whole)
        self.history.begin(effect)
        effect.sent()
        return effect

    def send_again(self, effect: Effect) -> None:
        self.tick()
        effect.sent()

    def close(self, effect: Effect) -> None:
        """The server closes a connection that the request was sent over."""
        effect.over(self.tick())

    def acknowledge(self, effect: Effect, *, fua: bool = False) -> None:
        now = self.tick()
        self.history.acknowledge(effect, now, durable=fua)
        effect.over(now)
        effect.settle(now)

    def write(self, serial: int, first: int = 0, stop: int = 8, *, fua: bool = False) -> None:
        self.acknowledge(self.send(serial, first, stop), fua=fua)

    def flush(self) -> None:
        start = self.tick()
        self.tick()
        self.history.flushed(start)

    def reads(self, *serials: int, start: int | None = None) -> None:
        """Read the first cells."""
        start = self.tick() if start is None else start
        self.history.check_read(0, holding(*serials)[: len(serials)], start, self.tick())

    def left(self, *serials: int, lossless: bool = False) -> None:
        """A crash leaves this."""
        self.history.check_crash(holding(*serials), self.tick(), lossless=lossless)


def holding(*serials: int) -> Stamps:
    """A volume whose first cells hold what these requests wrote, 0 = zeros."""
    found = zero_stamps(N_CELLS)
    for cell, serial in enumerate(serials):
        found[cell] = stamp(serial, cell, cell + 1)[0] if serial else 0
    return found


@pytest.fixture
def volume() -> Volume:
    return Volume()


def test_content_names_its_request_and_cell() -> None:
    stamps = stamp(7, 3, 9)
    assert stamps_of(content(stamps)).tolist() == stamps.tolist()
    assert len(set(stamps.tolist()) | set(stamp(8, 3, 9).tolist())) == 12


def test_a_torn_sector_is_seen() -> None:
    raw = bytearray(content(stamp(7, 0, 4)))
    raw[CELL + 100] ^= 1
    with pytest.raises(Wrong, match="torn"):
        stamps_of(bytes(raw))


# --- Reads ---------------------------------------------------------------------------------------


def test_a_read_sees_what_was_acknowledged(volume: Volume) -> None:
    volume.write(1)
    volume.reads(1)
    with pytest.raises(Wrong):
        volume.reads(0)


def test_a_read_may_or_may_not_see_what_is_in_flight(volume: Volume) -> None:
    volume.send(1)
    volume.reads(0)
    volume.reads(1)


def test_what_a_read_has_seen_does_not_go_away(volume: Volume) -> None:
    volume.send(1)
    volume.reads(1)
    with pytest.raises(Wrong):
        volume.reads(0)


def test_requests_in_flight_together_may_end_in_any_order(volume: Volume) -> None:
    first, second = volume.send(1), volume.send(2)
    volume.acknowledge(second)
    volume.acknowledge(first)
    volume.reads(2)
    with pytest.raises(Wrong):
        volume.reads(1)


def test_a_read_that_began_before_a_write_was_acknowledged_may_miss_it(volume: Volume) -> None:
    start = volume.tick()
    volume.write(1)
    volume.reads(0, start=start)


def test_a_lost_request_may_come_late_while_the_server_has_its_connection(volume: Volume) -> None:
    lost = volume.send(1)
    volume.send_again(lost)
    volume.acknowledge(lost)
    volume.write(2)
    volume.reads(1)


def test_a_lost_request_cannot_come_when_the_server_has_closed_its_connection(
    volume: Volume,
) -> None:
    lost = volume.send(1)
    volume.send_again(lost)
    volume.close(lost)
    volume.acknowledge(lost)
    volume.write(2)
    with pytest.raises(Wrong):
        volume.reads(1)


def test_block_status_may_call_zeros_only_what_may_be_zeros(volume: Volume) -> None:
    volume.write(1, 0, 8)
    volume.history.check_zeros(8, 16, volume.tick(), volume.tick())
    with pytest.raises(Wrong):
        volume.history.check_zeros(0, 9, volume.tick(), volume.tick())


# --- Crashes -------------------------------------------------------------------------------------


def test_a_crash_may_take_what_was_not_flushed(volume: Volume) -> None:
    volume.write(1, 0, 1)
    volume.write(2, 1, 2)
    for kept in ((), (1,), (1, 2)):
        volume.left(*kept)


def test_a_crash_may_not_take_what_was_flushed(volume: Volume) -> None:
    volume.write(1, 0, 1)
    volume.flush()
    volume.write(2, 1, 2)
    volume.left(1)
    with pytest.raises(Wrong):
        volume.left(0)


def test_a_flush_covers_only_what_was_acknowledged_before_it_was_sent(volume: Volume) -> None:
    late = volume.send(1, 0, 1)
    volume.flush()
    volume.acknowledge(late)
    volume.left(0)


def test_a_crash_may_not_take_an_old_write_and_leave_a_new_one(volume: Volume) -> None:
    volume.write(1, 0, 1)
    volume.write(2, 1, 2)
    with pytest.raises(Wrong, match="mixture"):
        volume.left(0, 2)


def test_writes_in_flight_together_are_kept_in_any_combination(volume: Volume) -> None:
    both = volume.send(1, 0, 1), volume.send(2, 1, 2)
    for effect in both:
        volume.acknowledge(effect)
    for kept in ((0, 0), (1, 0), (0, 2), (1, 2)):
        volume.left(*kept)


def test_a_write_in_flight_is_there_whole_or_not_at_all(volume: Volume) -> None:
    volume.send(1, 0, 3)
    volume.left(0, 0, 0)
    volume.left(1, 1, 1)
    with pytest.raises(Wrong, match="torn"):
        volume.left(1, 0, 1)


def test_a_write_in_flight_may_be_overwritten_in_part(volume: Volume) -> None:
    volume.send(1, 0, 3)
    volume.write(2, 1, 2)
    volume.left(1, 2, 1)


def test_zeroing_in_flight_may_be_there_in_part(volume: Volume) -> None:
    volume.write(1, 0, 2)
    volume.flush()
    volume.send(0, 0, 2, whole=False)
    volume.left(1, 0)


def test_a_write_with_fua_stays_although_nothing_was_flushed(volume: Volume) -> None:
    volume.write(1, 0, 1, fua=True)
    volume.left(1)
    with pytest.raises(Wrong):
        volume.left(0)


def test_a_killed_process_leaves_everything_that_was_acknowledged(volume: Volume) -> None:
    volume.write(1, 0, 1)
    volume.send(2, 1, 2)
    volume.left(1, 0, lossless=True)
    volume.left(1, 2, lossless=True)
    with pytest.raises(Wrong):
        volume.left(0, 2, lossless=True)


def test_cells_that_nobody_wrote_do_not_change(volume: Volume) -> None:
    volume.write(1, 0, 1)
    found = holding(1)
    found[20] = np.uint64(99)
    with pytest.raises(Wrong, match="nobody wrote"):
        volume.history.check_crash(found, volume.tick(), lossless=False)


def test_what_is_settled_is_forgotten(volume: Volume) -> None:
    for serial in range(1, 50):
        volume.write(serial, 0, 1)
        volume.flush()
    assert len(volume.history._cells[0]) < 5


# --- Snapshots -----------------------------------------------------------------------------------


def test_a_snapshot_is_of_one_moment_between_request_and_answer(volume: Volume) -> None:
    volume.write(1)
    start = volume.tick()
    volume.history.begin_read(start)
    volume.write(2, 0, 1)
    volume.write(3, 1, 2)
    now = volume.tick()
    volume.write(4, 0, 1)
    rest = [1] * 6
    for allowed in ([1, 1], [2, 1], [2, 3]):
        volume.history.check_moment(holding(*allowed, *rest), start, now)
    with pytest.raises(Wrong, match="mixture"):
        volume.history.check_moment(holding(1, 3, *rest), start, now)
    with pytest.raises(Wrong, match="from"):
        volume.history.check_moment(holding(4, 3, *rest), start, now)


def test_a_snapshot_holds_what_was_acknowledged_before_flushed_or_not(volume: Volume) -> None:
    volume.write(1)
    start = volume.tick()
    with pytest.raises(Wrong, match="from"):
        volume.history.check_moment(holding(), start, volume.tick())
    with pytest.raises(Wrong, match="cells"):
        volume.history.check_moment(holding()[:-1], start, volume.tick())
