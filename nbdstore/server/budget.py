"""The memory that all connections share for requests and replies.

Half of it is divided into shares: each connection may hold as much as its share whatever the
others do, so that one which holds little always goes on. What a connection holds beyond its share
comes out of the other half, the common part: first come, first served, and who asks for much is
not overtaken by those who ask for little. A request that is larger than the common part begins
when nobody uses that part.

    held by all connections <= total, and one request of up to 32 MiB

Beside it there are only the receive buffers of small requests, 516 KiB for each connection, and the
spares. Under TLS a connection also has what is encrypted: up to 256 KiB that were received, 512 KiB
that are to be sent, and OpenSSL's copy of either. What is served and sent at once is never held.

A client that does not get on while it holds something, and others wait, is cut off in time (see
`Session.stall`), so what waits here does not wait for ever.

Concurrency: everything runs on the loop's thread, and nothing awaits.
"""

from __future__ import annotations

from collections.abc import Callable

from nbdstore.protocol.transmission import Spares


class Budget:
    """The memory of one server.

    Arguments:
        total_bytes: what all connections may hold together.
        n_connections: how many there may be.
    """

    def __init__(self, total_bytes: int, n_connections: int) -> None:
        self.share = total_bytes // 2 // n_connections
        self.common_bytes = total_bytes - self.share * n_connections
        self.common_free = self.common_bytes
        """May be negative for a moment: what is held is told after the fact."""
        self.free_for_all = self.common_free
        """What may be taken without asking: the common part, as long as nobody waits for it."""
        self.spares = Spares()
        self._waiting: dict[Account, None] = {}

    def open(self, wake: Callable[[], None]) -> Account:
        """Open a connection's account; `wake` is called when what waits may fit."""
        return Account(self, wake)

    @property
    def is_contended(self) -> bool:
        """Whether somebody waits for what others hold."""
        return bool(self._waiting)

    # --- For accounts ------------------------------------------------------------------------

    def is_first(self, account: Account) -> bool:
        """Whether nobody else came earlier."""
        return not self._waiting or next(iter(self._waiting)) is account

    def freed(self, n_bytes: int) -> None:
        """The common part has become larger, or smaller if that is negative."""
        self.common_free += n_bytes
        self._changed()

    def wait(self, account: Account) -> None:
        """Put an account at the end of the line, unless it waits already."""
        self._waiting.setdefault(account)
        self.free_for_all = 0

    def leave(self, account: Account) -> None:
        """Take an account out of the line; the next may fit."""
        del self._waiting[account]
        self._changed()

    def _changed(self) -> None:
        """Tell the first in the line to look again."""
        self.free_for_all = 0 if self._waiting else self.common_free
        for account in self._waiting:
            account.wake()
            break


class Account:
    """What one connection holds."""

    __slots__ = ("_budget", "held", "is_waiting", "wake")

    def __init__(self, budget: Budget, wake: Callable[[], None]) -> None:
        self._budget = budget
        self.wake = wake
        self.held = 0
        self.is_waiting = False

    def set(self, held: int) -> None:
        """Tell how many bytes the connection holds now."""
        share = self._budget.share
        freed = max(0, self.held - share) - max(0, held - share)
        self.held = held
        if freed:
            self._budget.freed(freed)

    def fits(self, n_bytes: int) -> bool:
        """Whether the connection may hold `n_bytes` more."""
        budget = self._budget
        wanted = self.held + n_bytes - max(self.held, budget.share)
        if wanted <= 0:
            return True
        if not budget.is_first(self):
            return False
        return wanted <= budget.common_free or budget.common_free == budget.common_bytes

    def wait(self) -> None:
        """Ask to be woken when something may fit that does not fit now."""
        self.is_waiting = True
        self._budget.wait(self)

    def room(self) -> int:
        """How many bytes more would fit now."""
        budget = self._budget
        room = max(0, budget.share - self.held)
        return room + max(0, budget.common_free) if budget.is_first(self) else room

    def stop_waiting(self) -> None:
        """What was waited for has begun, or is not wanted any more."""
        if self.is_waiting:
            self.is_waiting = False
            self._budget.leave(self)

    def close(self) -> None:
        """The connection is over: give everything back."""
        self.set(0)
        self.stop_waiting()
