"""Limits of volumes: requests wait here until the tokens of their volume allow them.

Owns the token buckets and whose turn it is. Each volume that has limits (`nbdstore.qos`) has one
`Limiter`; each session has a `Gate`, through which its requests go to the server only as fast as
that allows. Without limits a gate costs one comparison per batch of requests.

What costs what: READ and WRITE cost one operation and their length; FLUSH and DISC cost nothing,
so that they never wait for tokens; every other command costs one operation.

Tokens may be overdrawn: a request may go when there are any, and is paid for in full, so one that
is larger than the bucket goes too, and those after it wait for longer. On the average over more
than `burst_s` the limits hold exactly, whatever the sizes.

Whose turn it is: that client's to whom the least was given, as in start-time fair queueing (Goyal,
Vin, Cheng 1996). What was given is counted in seconds of the limiter's time, which makes large and
small requests comparable; who comes after a pause starts level with the others.
Connections from one host, or of one local process, count as one client.

Requests are held back, never refused. What a session has been given, it serves like any other; it
is not read from while its gate holds something, so its client waits in its own socket. Large
payloads wait before they are received, and take no memory meanwhile. Clients of a snapshot share
the limits of its volume.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

from nbdstore import qos
from nbdstore.protocol.constants import Command
from nbdstore.protocol.transmission import Request
from nbdstore.qos import Qos
from nbdstore.store import Image, Snapshot

MIN_BURST_S = 0.02
"""A bucket that holds less would run over between two looks at it."""
MIN_WAIT_S = 0.002
"""Between two looks at the buckets: at 100,000 requests per second each lets 200 go."""
QUANTUM_S = 0.005
"""How much of the limiter's time one client gets before it is another's turn."""
MAX_REMEMBERED = 1024
"""Clients of whom it is known what was given to them."""

_READ, _WRITE = int(Command.READ), int(Command.WRITE)
_FREE = frozenset({int(Command.FLUSH), int(Command.DISC)})

LetThrough = Callable[[list[Request]], None]


class Timer(Protocol):
    """What has been asked to be called, and can be called off."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """What a limiter needs of an event loop."""

    def time(self) -> float: ...
    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer: ...


class Bucket:
    """Tokens that come at a steady rate.

    Arguments:
        rate: tokens per second; 0 = there are always enough.
        capacity: how many are kept at most; it is full at first.
    """

    __slots__ = ("_capacity", "_rate", "level", "seconds_each")

    def __init__(self, rate: float, capacity: float) -> None:
        self._rate = rate
        self._capacity = self.level = capacity if rate else math.inf
        self.seconds_each = 1 / rate if rate else 0.0

    @classmethod
    def of(cls, rate: int, burst_s: float) -> Bucket:
        """A bucket for `burst_s` seconds' worth of tokens, and at least for one."""
        return cls(rate, max(1.0, rate * max(burst_s, MIN_BURST_S)))

    def refill(self, elapsed_s: float) -> None:
        """Add what has come in `elapsed_s`."""
        self.level = min(self._capacity, self.level + self._rate * elapsed_s)

    def wait_s(self) -> float:
        """How long it takes until there is a token."""
        return max(0.0, -self.level * self.seconds_each) if self._rate else 0.0

    def keep(self, old: Bucket) -> None:
        """Start with what an old bucket has, overdrawn or not, and no more than fits."""
        if self._rate:
            self.level = min(self._capacity, old.level)


class Limiter:
    """The limits of one volume, and who waits for them.

    Arguments:
        limits: what they are at first.
        clock: tells the time, and wakes; the running loop if None.
    """

    def __init__(self, limits: Qos, clock: Clock | None = None) -> None:
        self._clock: Clock = clock or asyncio.get_running_loop()
        self._limits = limits
        self._operations = Bucket.of(limits.iops, limits.burst_s)
        self._bytes = Bucket.of(limits.bandwidth, limits.burst_s)
        self._refilled_s = self._clock.time()
        self._waiting: dict[Gate, None] = {}
        self._given: dict[str, float] = {}
        self._floor = 0.0
        """What was given to the client whose turn it was last, before that."""
        self._timer: Timer | None = None

    def change(self, limits: Qos) -> None:
        """Have other limits from now on."""
        if limits == self._limits:
            return
        self._refill()
        self._limits = limits
        old_operations, old_bytes = self._operations, self._bytes
        self._operations = Bucket.of(limits.iops, limits.burst_s)
        self._bytes = Bucket.of(limits.bandwidth, limits.burst_s)
        self._operations.keep(old_operations)
        self._bytes.keep(old_bytes)
        self._look_again()

    # --- For gates -----------------------------------------------------------------------------

    def take(self, gate: Gate, requests: Sequence[Request]) -> int:
        """Tell how many of `requests` may go at once, and have them paid for."""
        return self._pay(gate.client, requests, 0.0 if self._waiting else math.inf)

    def wait(self, gate: Gate) -> None:
        """Have a gate called when some of what it holds may go."""
        self._waiting[gate] = None
        if self._timer is None:
            self._look_again()

    def leave(self, gate: Gate) -> None:
        """Forget a gate that waits."""
        del self._waiting[gate]
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- Tokens and turns ----------------------------------------------------------------------

    def _refill(self) -> None:
        now_s = self._clock.time()
        self._operations.refill(now_s - self._refilled_s)
        self._bytes.refill(now_s - self._refilled_s)
        self._refilled_s = now_s

    def _pay(self, client: str, requests: Sequence[Request], quantum_s: float) -> int:
        """Pay for the first of `requests`: those that have tokens, up to `quantum_s` of time."""
        self._refill()
        operations, n_bytes = self._operations, self._bytes
        spent_s, n = 0.0, 0
        for command, _, _, _, length, _, verdict in requests:
            if command not in _FREE:
                if operations.level <= 0 or n_bytes.level <= 0 or spent_s >= quantum_s:
                    break
                moved = length if command in (_READ, _WRITE) and not verdict else 0
                operations.level -= 1
                n_bytes.level -= moved
                spent_s += max(operations.seconds_each, moved * n_bytes.seconds_each)
            n += 1
        if spent_s:
            before = self._given_to(client)
            self._floor = max(self._floor, before)
            self._given[client] = before + spent_s
            if len(self._given) > MAX_REMEMBERED:
                self._forget()
        return n

    def _given_to(self, client: str) -> float:
        return max(self._given.get(client, 0.0), self._floor)

    def _forget(self) -> None:
        """Drop what says no more than that a client is level with the others.

        That is all, if nobody waits: then everybody has got what was asked for.
        """
        floor = self._floor if self._waiting else math.inf
        self._given = {key: given for key, given in self._given.items() if given > floor}

    def _serve(self) -> None:
        """Give turns to those who wait, as long as there are tokens.

        Whoever has got all that it asked for may be back with more at the next look: until then,
        nobody is served to whom more was given. So a client that sends little at a time does not
        lose its turns to one that always waits.
        """
        self._timer = None
        least = math.inf
        while self._waiting:
            gate = min(self._waiting, key=lambda waiting: self._given_to(waiting.client))
            if self._given_to(gate.client) > least:
                break
            n = self._pay(gate.client, gate.held, QUANTUM_S)
            if not n:
                break
            if n == len(gate.held):
                del self._waiting[gate]
                least = min(least, self._given_to(gate.client))
            elif len(self._waiting) > 1:
                # Of several gates of one client, the one that has waited longest is next.
                del self._waiting[gate]
                self._waiting[gate] = None
            gate.release(n)
        self._look_again()

    def _look_again(self) -> None:
        """Look at the buckets when there is a token in each."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            wait_s = max(self._operations.wait_s(), self._bytes.wait_s(), MIN_WAIT_S)
            self._timer = self._clock.call_later(wait_s, self._serve)


class Gate:
    """What the requests of one session go through.

    Arguments:
        client: whose they are; what shares a name shares its turns.
        let_through: called with requests that were held and may go now, and with none when a
            payload may be received for which `begins` has said no.

    Attributes:
        held: what waits, in order. The session must not be read from while there is something.
    """

    def __init__(self, client: str, let_through: LetThrough) -> None:
        self.client = client
        self.limiter: Limiter | None = None
        self.held: list[Request] = []
        self._let_through = let_through
        self._awaited: Request | None = None
        """Held, though its payload has not come."""
        self._begun: Request | None = None
        """It was paid for before its payload came."""

    def take(self, requests: list[Request]) -> list[Request]:
        """Return those of `requests` that may go now; hold the rest. Nothing is held yet."""
        if self.limiter is None:
            return requests
        assert not self.held
        n = self.limiter.take(self, requests)
        if n < len(requests):
            self.held = requests[n:]
            self.limiter.wait(self)
        return requests[:n]

    def begins(self, request: Request) -> bool:
        """Whether the payload of `request`, which is large, may be received; it is paid for then.

        If it may not, `let_through` is called when it may.
        """
        if self.limiter is None or request is self._begun:
            return True
        if not self.held and self.take([request]):
            self._begun = request
            return True
        self._awaited = request
        return False

    def release(self, n: int) -> None:
        """Let the first `n` of what is held go; they are paid for."""
        requests, self.held = self.held[:n], self.held[n:]
        if requests[0] is self._awaited:
            self._begun, self._awaited = self._awaited, None
            requests = []
        self._let_through(requests)

    def switch(self, limiter: Limiter | None) -> None:
        """Have another limiter, or none; what is held goes on by that."""
        if limiter is self.limiter:
            return
        held, awaited = self.held, self._awaited
        self.close()
        self.limiter = limiter
        if held:
            self._let_through([] if held[0] is awaited else self.take(held))

    def close(self) -> None:
        """Drop what is held, and hold nothing any more."""
        if self.held:
            assert self.limiter is not None
            self.limiter.leave(self)
        self.limiter = None
        self.held = []
        self._awaited = self._begun = None


def volume_of(image: Image) -> Image:
    """Return the volume by whose limits an image is read: a snapshot has those of its volume."""
    return image.volume if isinstance(image, Snapshot) else image


class Limiters:
    """The limiters of all volumes of a server that have limits."""

    def __init__(self) -> None:
        self._limiters: WeakKeyDictionary[Image, Limiter] = WeakKeyDictionary()

    def of(self, image: Image) -> Limiter | None:
        """Return the limiter of a volume, or a snapshot's volume, by its limits of now; or None."""
        volume = volume_of(image)
        limits = qos.current(volume.properties)
        limiter = self._limiters.get(volume)
        if not limits:
            self._limiters.pop(volume, None)
            return None
        if limiter is None:
            limiter = self._limiters[volume] = Limiter(limits)
        limiter.change(limits)
        return limiter
