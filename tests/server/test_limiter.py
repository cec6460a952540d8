"""Token buckets and turns, on a clock that the tests turn; test_limits has what clients notice."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import pytest

from nbdstore.protocol.constants import Command
from nbdstore.protocol.transmission import Request
from nbdstore.qos import Qos
from nbdstore.server.limiter import MIN_BURST_S, QUANTUM_S, Gate, Limiter, Limiters
from tests.server.memory_pool import MemoryVolume

MIB = 1 << 20
BLOCK = 4096


class Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class TestClock:
    """A clock that stands still until it is turned."""

    __test__ = False

    def __init__(self) -> None:
        self.now_s = 100.0
        self._timers: list[tuple[float, int, Timer]] = []
        self._ids = itertools.count()

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (self.now_s + delay, next(self._ids), timer))
        return timer

    def turn(self, seconds: float) -> None:
        """Let time go by, and what is due happen."""
        end_s = self.now_s + seconds
        while self._timers and self._timers[0][0] <= end_s:
            self.now_s, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        self.now_s = end_s

    @property
    def n_timers(self) -> int:
        return sum(timer.callback is not None for _, _, timer in self._timers)


class Client:
    """A session's part: it has a gate, and remembers what came through it, and when."""

    def __init__(self, clock: TestClock, limiter: Limiter | None, name: str = "client") -> None:
        self.clock = clock
        self.let_through: list[tuple[float, Request]] = []
        self.n_calls = 0
        self.gate = Gate(name, self._take)
        self.gate.switch(limiter)

    def _take(self, requests: list[Request]) -> None:
        self.n_calls += 1
        self.let_through += [(self.clock.now_s, request) for request in requests]

    def send(self, *requests: Request) -> None:
        """Send requests that come in one batch."""
        self._take(self.gate.take(list(requests)))

    @property
    def n(self) -> int:
        return len(self.let_through)

    @property
    def n_bytes(self) -> int:
        return sum(request[4] for _, request in self.let_through)


class Reader(Client):
    """Sends its next read when the reply to one has come, 1 ms after that was let through."""

    def __init__(self, clock: TestClock, limiter: Limiter, name: str, length: int) -> None:
        super().__init__(clock, limiter, name)
        self.read = request(Command.READ, length)
        self.unread = 0

    def send_one(self) -> None:
        """Send a read; as with a socket, it is seen when the gate holds nothing any more."""
        self.unread += 1
        self._receive()

    def _receive(self) -> None:
        if not self.gate.held and self.unread:
            n, self.unread = self.unread, 0
            self.send(*[self.read] * n)

    def _take(self, requests: list[Request]) -> None:
        super()._take(requests)
        for _ in requests:
            self.clock.call_later(0.001, self.send_one)
        self.clock.call_later(0, self._receive)


def request(command: Command, length: int = BLOCK, verdict: int = 0) -> Request:
    return (int(command), 0, b"cookie..", 0, length, None, verdict)


READ = request(Command.READ)
FLUSH = request(Command.FLUSH, 0)


@pytest.fixture
def clock() -> TestClock:
    return TestClock()


class TestRates:
    def test_requests_per_second(self, clock: TestClock) -> None:
        client = Client(clock, Limiter(Qos(iops=100, burst_s=1), clock))
        client.send(*[READ] * 1000)
        assert client.n == 100, "what was saved up goes at once"
        for second in range(1, 9):
            clock.turn(1)
            assert abs(client.n - 100 * (1 + second)) <= 2
        clock.turn(1.1)
        assert client.n == 1000
        assert clock.n_timers == 0

    def test_bytes_per_second(self, clock: TestClock) -> None:
        client = Client(clock, Limiter(Qos(bandwidth=MIB, burst_s=0), clock))
        writes = [request(Command.WRITE, 64 << 10), request(Command.READ, 64 << 10)]
        client.send(*writes * 50)
        clock.turn(1)
        assert client.n_bytes == pytest.approx(MIB, abs=128 << 10)
        clock.turn(4)
        assert client.n_bytes == pytest.approx(5 * MIB, abs=128 << 10)

    def test_the_narrower_of_both_holds(self, clock: TestClock) -> None:
        limits = Qos(iops=100, bandwidth=10 * MIB, burst_s=0)
        small, large = Client(clock, Limiter(limits, clock)), Client(clock, Limiter(limits, clock))
        small.send(*[READ] * 1000)
        large.send(*[request(Command.READ, MIB)] * 1000)
        clock.turn(5)
        assert small.n == pytest.approx(500, abs=3)
        assert large.n == pytest.approx(50, abs=2)

    def test_requests_larger_than_the_bucket_keep_the_rate(self, clock: TestClock) -> None:
        client = Client(clock, Limiter(Qos(bandwidth=MIB, burst_s=0.1), clock))
        client.send(*[request(Command.WRITE, 32 * MIB)] * 4)
        assert client.n == 1
        for _ in range(3):
            clock.turn(30)
            n_before = client.n
            clock.turn(2.1)
            assert client.n == n_before + 1

    def test_many_requests_per_second(self, clock: TestClock) -> None:
        """More than there are looks at the buckets."""
        client = Client(clock, Limiter(Qos(iops=500_000, burst_s=0), clock))
        client.send(*[READ] * 600_000)
        clock.turn(1)
        assert client.n == pytest.approx(510_000, rel=0.01)

    def test_what_is_left_unused_is_kept_up_to_the_burst(self, clock: TestClock) -> None:
        client = Client(clock, Limiter(Qos(iops=100, burst_s=3), clock))
        client.send(*[READ] * 300)
        clock.turn(1000)
        client.send(*[READ] * 1000)
        assert client.n == 600

    @pytest.mark.parametrize(
        ("sent", "n_now"),
        [
            (request(Command.TRIM, 1 << 30), 10),
            (request(Command.WRITE_ZEROES, 1 << 30), 10),
            (request(Command.CACHE, 1 << 30), 10),
            (request(Command.BLOCK_STATUS, 1 << 30), 10),
            (request(Command.READ, 1 << 30, verdict=22), 10),
            (FLUSH, 50),
            (request(Command.DISC, 0), 50),
        ],
    )
    def test_what_costs_what(self, clock: TestClock, sent: Request, n_now: int) -> None:
        client = Client(clock, Limiter(Qos(iops=10, bandwidth=MIB, burst_s=1), clock))
        client.send(*[sent] * 50)
        assert client.n == n_now
        clock.turn(1)
        assert client.n == pytest.approx(min(50, 2 * n_now), abs=1)

    def test_order_is_kept(self, clock: TestClock) -> None:
        client = Client(clock, Limiter(Qos(iops=10, burst_s=0), clock))
        sent = [(*READ[:3], offset, *READ[4:]) for offset in range(30)]
        sent = [FLUSH if offset % 7 == 0 else item for offset, item in enumerate(sent)]
        client.send(*sent)
        clock.turn(10)
        assert [item for _, item in client.let_through] == sent

    @pytest.mark.parametrize("seed", range(20))
    def test_never_more_than_the_rate_and_never_idle(self, clock: TestClock, seed: int) -> None:
        rng = random.Random(seed)
        limits = Qos(
            iops=rng.choice([0, 50, 1000]),
            bandwidth=rng.choice([4 * MIB, 100 * MIB]),
            burst_s=rng.choice([0, 0.5, 2]),
        )
        limiter = Limiter(limits, clock)
        clients = [Client(clock, limiter, f"client {n}") for n in range(rng.randint(1, 5))]
        start_s, largest = clock.now_s, 4 * MIB
        for _ in range(200):
            for client in clients:
                if not client.gate.held and rng.random() < 0.7:
                    sizes = [rng.choice([BLOCK, MIB, largest]) for _ in range(rng.randint(1, 20))]
                    client.send(*[request(Command.READ, size) for size in sizes])
            clock.turn(rng.choice([0.001, 0.1, 1]))
            elapsed_s = clock.now_s - start_s + max(limits.burst_s, MIN_BURST_S)
            assert sum(client.n_bytes for client in clients) <= (
                limits.bandwidth * elapsed_s + largest
            )
            if limits.iops:
                assert sum(client.n for client in clients) <= max(1, limits.iops * elapsed_s) + 1
        clock.turn(3600)
        assert all(not client.gate.held for client in clients)
        assert clock.n_timers == 0


class TestTurns:
    def test_large_requests_get_no_more_than_small_ones(self, clock: TestClock) -> None:
        limiter = Limiter(Qos(bandwidth=10 * MIB, burst_s=0), clock)
        large, small = Client(clock, limiter, "large"), Client(clock, limiter, "small")
        large.send(*[request(Command.READ, MIB)] * 500)
        small.send(*[READ] * 50_000)
        clock.turn(10)
        assert small.n_bytes == pytest.approx(50 * MIB, rel=0.05)
        assert large.n_bytes == pytest.approx(50 * MIB, rel=0.05)

    def test_many_connections_are_still_one_client(self, clock: TestClock) -> None:
        limiter = Limiter(Qos(iops=1000, burst_s=0), clock)
        crowd = [Client(clock, limiter, "crowd") for _ in range(7)]
        alone = Client(clock, limiter, "alone")
        for client in (*crowd, alone):
            client.send(*[READ] * 10_000)
        clock.turn(10)
        assert alone.n == pytest.approx(5000, rel=0.05)
        for client in crowd:
            assert client.n == pytest.approx(5000 / 7, rel=0.1)

    def test_a_client_that_asks_for_little_does_not_wait_for_one_that_asks_for_much(
        self, clock: TestClock
    ) -> None:
        limiter = Limiter(Qos(iops=100, burst_s=1), clock)
        greedy, modest = Client(clock, limiter, "greedy"), Client(clock, limiter, "modest")
        greedy.send(*[READ] * 10_000)
        clock.turn(5)
        for n in range(1, 21):
            modest.send(READ)
            clock.turn(QUANTUM_S + 0.04)
            assert modest.n == n

    def test_who_waits_for_replies_gets_as_much_as_who_sends_all_the_time(
        self, clock: TestClock
    ) -> None:
        limiter = Limiter(Qos(bandwidth=40 * MIB, burst_s=0.1), clock)
        eager, small = Client(clock, limiter, "eager"), Reader(clock, limiter, "small", 16 << 10)
        eager.send(*[request(Command.READ, 256 << 10)] * 5000)
        for _ in range(16):
            small.send_one()
        clock.turn(10)
        assert small.n_bytes == pytest.approx(200 * MIB, rel=0.1)
        assert eager.n_bytes == pytest.approx(200 * MIB, rel=0.1)

    def test_many_who_wait_for_replies_do_not_wait_for_each_other(self, clock: TestClock) -> None:
        limiter = Limiter(Qos(iops=10_000, burst_s=0.1), clock)
        readers = [Reader(clock, limiter, f"reader {n}", BLOCK) for n in range(100)]
        for reader in readers:
            reader.send_one()
        clock.turn(5)
        assert sum(reader.n for reader in readers) == pytest.approx(50_000, rel=0.05)
        for reader in readers:
            assert reader.n == pytest.approx(500, rel=0.1)

    def test_nobody_saves_up_turns(self, clock: TestClock) -> None:
        """Who was away while another was served does not make that one wait now."""
        limiter = Limiter(Qos(iops=100, burst_s=0), clock)
        first, second = Client(clock, limiter, "first"), Client(clock, limiter, "second")
        first.send(*[READ] * 10_000)
        clock.turn(60)
        n_before = first.n
        second.send(*[READ] * 10_000)
        clock.turn(10)
        assert first.n - n_before == pytest.approx(500, abs=20)

    def test_flushes_do_not_wait_for_others(self, clock: TestClock) -> None:
        limiter = Limiter(Qos(iops=10, burst_s=0), clock)
        writer, other = Client(clock, limiter, "writer"), Client(clock, limiter, "other")
        writer.send(*[READ] * 1000)
        other.send(FLUSH)
        assert other.n == 1

    def test_what_is_known_of_clients_is_bounded(self, clock: TestClock) -> None:
        limiter = Limiter(Qos(iops=10**6, burst_s=1), clock)
        for n in range(5000):
            Client(clock, limiter, f"client {n}").send(READ)
            clock.turn(0.001)
        assert len(limiter._given) < 2000


class TestChanges:
    def test_a_wider_limit_is_felt_at_once(self, clock: TestClock) -> None:
        limiter = Limiter(Qos(bandwidth=MIB, burst_s=0), clock)
        client = Client(clock, limiter)
        client.send(*[request(Command.READ, 32 * MIB)] * 2)
        clock.turn(1)
        assert client.n == 1
        limiter.change(Qos(bandwidth=1000 * MIB, burst_s=0))
        clock.turn(0.1)
        assert client.n == 2

    def test_a_narrower_limit_is_felt_at_once(self, clock: TestClock) -> None:
        limiter = Limiter(Qos(iops=1000, burst_s=10), clock)
        limiter.change(Qos(iops=10, burst_s=1))
        client = Client(clock, limiter)
        client.send(*[READ] * 100)
        assert client.n == 10

    def test_changing_does_not_fill_the_bucket(self, clock: TestClock) -> None:
        limiter = Limiter(Qos(iops=10, burst_s=1), clock)
        client = Client(clock, limiter)
        client.send(*[READ] * 100)
        for iops in range(11, 30):
            limiter.change(Qos(iops=iops, burst_s=1))
        clock.turn(0.01)
        assert client.n <= 11

    def test_one_more_limit(self, clock: TestClock) -> None:
        limiter = Limiter(Qos(iops=1000, burst_s=1), clock)
        client = Client(clock, limiter)
        limiter.change(Qos(iops=1000, bandwidth=MIB, burst_s=1))
        client.send(*[request(Command.READ, MIB)] * 10)
        assert client.n == 1

    def test_no_limit_lets_everything_go(self, clock: TestClock) -> None:
        client = Client(clock, Limiter(Qos(iops=1, burst_s=0), clock))
        client.send(*[READ] * 100)
        client.gate.switch(None)
        assert client.n == 100
        assert clock.n_timers == 0
        client.send(READ)
        assert client.n == 101

    def test_a_limit_where_there_was_none(self, clock: TestClock) -> None:
        client = Client(clock, None)
        client.send(*[READ] * 100)
        assert client.n == 100
        client.gate.switch(Limiter(Qos(iops=10, burst_s=1), clock))
        client.send(*[READ] * 100)
        assert client.n == 110

    def test_who_leaves_is_not_waited_for(self, clock: TestClock) -> None:
        limiter = Limiter(Qos(iops=10, burst_s=0), clock)
        leaving, staying = Client(clock, limiter, "leaving"), Client(clock, limiter, "staying")
        leaving.send(*[READ] * 1000)
        staying.send(*[READ] * 20)
        leaving.gate.close()
        n_before = leaving.n
        clock.turn(2.5)
        assert (leaving.n, staying.n) == (n_before, 20)
        assert clock.n_timers == 0


class TestPayloads:
    LARGE = request(Command.WRITE, 2 * MIB)

    def test_wait_before_they_are_received(self, clock: TestClock) -> None:
        client = Client(clock, Limiter(Qos(bandwidth=MIB, burst_s=1), clock))
        assert client.gate.begins(self.LARGE)
        assert client.gate.begins(self.LARGE), "it is asked more than once"
        later = request(Command.WRITE, MIB)
        assert not client.gate.begins(later)
        n_calls = client.n_calls
        clock.turn(0.9)
        assert not client.gate.begins(later)
        clock.turn(0.2)
        assert (client.n, client.n_calls) == (0, n_calls + 1)
        assert client.gate.begins(later)

    def test_go_on_without_a_limit(self, clock: TestClock) -> None:
        client = Client(clock, Limiter(Qos(bandwidth=MIB, burst_s=0), clock))
        client.gate.take([self.LARGE])
        assert not client.gate.begins(self.LARGE)
        n_calls = client.n_calls
        client.gate.switch(None)
        assert (client.n, client.n_calls) == (0, n_calls + 1)
        assert client.gate.begins(self.LARGE)


class TestLimiters:
    async def test_a_volume_has_one_as_long_as_it_has_limits(self) -> None:
        limiters, volume = Limiters(), MemoryVolume("disk", MIB)
        assert limiters.of(volume) is None
        volume.properties["qos"] = {"iops": 5, "bandwidth": 0, "burst_s": 1.0}
        limiter = limiters.of(volume)
        assert limiter is not None
        assert limiters.of(volume) is limiter
        volume.properties["qos"]["iops"] = 0
        assert limiters.of(volume) is None
