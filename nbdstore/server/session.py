"""One client's transmission phase: the hot path of the server.

Joins the request parser, a volume and a channel. A round is what one wake-up costs: receive once,
parse all that is complete, walk it, hand all plain writes, and reads of one length, to the store at
once, send all replies by one system call. There is no task, future or coroutine per request in it.

FLUSH, and writes with FUA, are answered from the store's callback after the next sync. Any other
request leaves the round for a task of its own when the store would have to wait (a cold read, a
full pool), or when its command always does (TRIM, ...). Its reply is queued when it is
done: NBD replies may come in any order, and so may the effects of requests in flight ("Ordering of
messages and writes"), which is why all writes of a round can go to the store together.

What bounds memory: payloads in flight or on their way here, and replies not yet sent, count as
held, and requests are read only while there is room for more, in this session's limits and in the
budget of all, so a client that never reads its replies stops being read from. Requests that were
parsed but find no room wait in ``_backlog``, their payloads still in the receive buffer, which is
not touched before they are served. A client that holds something and does not get on with its own
part is stalled; whoever asks `stall` now and then cuts it off.

    state          reads requests   leaves it when
    ------------   --------------   ----------------------------------------------------
    serving        while room       DISC, end of stream or drain -> ending; fault -> lost;
                                    end of stream with requests in flight -> lost
    ending         no               everything is answered and sent -> done
    lost           no               its tasks, which are cancelled, have ended -> done

Everything runs on the loop's thread; a task may be cancelled wherever it waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from time import perf_counter_ns

from nbdstore.errors import NotFound, ProtocolError, StoreError
from nbdstore.protocol.agreement import Agreement
from nbdstore.protocol.constants import Command, CommandFlag
from nbdstore.protocol.replies import Buffer, make_replies
from nbdstore.protocol.rules import Rules
from nbdstore.protocol.transmission import Request, RequestParser
from nbdstore.server.budget import Budget
from nbdstore.server.channel import Channel, Outbox
from nbdstore.server.commands import Target, perform, round_cost
from nbdstore.server.counters import ImageCounters
from nbdstore.server.exports import VolumeOffer
from nbdstore.server.gathering import Gathering, Held
from nbdstore.server.limiter import Gate, Limiter
from nbdstore.server.options import Limits
from nbdstore.server.reads import answer_now, weigh_reads
from nbdstore.server.stall import Stall
from nbdstore.server.turns import OnceATurn
from nbdstore.server.wakefulness import Wakefulness

log = logging.getLogger(__name__)

_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_DISC = int(Command.DISC)
_FLUSH = int(Command.FLUSH)
_FUA = int(CommandFlag.FUA)


class Session:
    """One client's transmission phase.

    Arguments:
        channel: receives and sends; closed by the caller after `serve`.
        agreement: what the handshake ended in; its offer is a VolumeOffer.
        limits: see Limits.
        budget, wakefulness: of the server.
        gathering: of the volume.
        client: who it is, for the fairness of its volume's limits.
        counters: of the volume; None = nobody asks for them.
    """

    def __init__(
        self,
        channel: Channel,
        agreement: Agreement,
        limits: Limits,
        budget: Budget,
        wakefulness: Wakefulness,
        gathering: Gathering,
        client: str = "",
        counters: ImageCounters | None = None,
    ) -> None:
        assert isinstance(agreement.offer, VolumeOffer)
        self.volume = agreement.offer.volume
        self.fault: Exception | None = None
        """Why the client was lost; None if it left properly."""
        self.in_flight = 0
        """Requests that a task serves, or that wait for a sync."""
        self.n_requests = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.gate = Gate(client, partial(self._guard, self._let_through))
        """Holds back what the volume's limits do not allow yet."""

        self._loop = asyncio.get_running_loop()
        self._channel = channel
        self._limits = limits
        self._budget = budget
        self._wakefulness = wakefulness
        self._gathering = gathering
        self._account = budget.open(self._once_a_turn(self._settle))
        self._parser = RequestParser(Rules(agreement), spares=budget.spares)
        self.grow()  # it may have grown since its size was told
        self._replies = make_replies(agreement.mode)
        self._counters = counters or ImageCounters()
        self._counters.begin(self)
        since, errors = agreement.offer.since, self._counters.errors
        self._target = Target(
            self.volume, self._replies, agreement.contexts, since, limits.max_extents, errors
        )
        self._outbox = Outbox()
        self._backlog: list[Request] = []
        self._gathered: Held | None = None
        self._bytes_in_flight = 0
        self._n_syncing = 0
        """Requests that wait for a sync."""
        self._receiving = 0
        """Bytes that the account holds for a large payload on its way here."""
        self._n_partial = 0
        """Bytes received without completing a request, ever."""
        self._n_taken = 0
        """Bytes that the client took when it had let some wait, ever."""
        self._is_short = False
        """Whether a large payload is left unread, since there is no room for it."""
        self._stall: Stall | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.done: asyncio.Future[None] = self._loop.create_future()
        """Done once no request of this client is executed, or will be."""
        self._ending = False
        self._lost = False
        self._reading = False
        self._blocked = False
        self._send_soon = self._once_a_turn(self._send)
        self._run_soon = self._once_a_turn(self._run_backlog)

    # --- Life --------------------------------------------------------------------------------

    async def serve(self, first_bytes: bytes) -> None:
        """Serve the client to its end, beginning with the bytes behind the handshake."""
        self._gathering.n_clients += 1
        try:
            self._guard(self._take_first, first_bytes)
            await asyncio.shield(self.done)  # a cancelled task must not make it look done
        finally:
            self._counters.end(self)
            self._gathering.n_clients -= 1
            self.lose(ConnectionAbortedError("the server gave the connection up"))
            self._cancel_tasks()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._account.close()

    def _take_first(self, data: bytes) -> None:
        if data:
            self._parser.get_buffer()[: len(data)] = data
            self._received(len(data))
        self._settle()

    @property
    def n_pending(self) -> int:
        """Requests that have come and are not answered yet."""
        return self.in_flight + len(self._backlog) + len(self.gate.held)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Requests, bytes read and bytes written, since the client attached."""
        return self.n_requests, self.bytes_read, self.bytes_written

    @property
    def has_ended(self) -> bool:
        """Whether no request of this client is executed, or will be."""
        return self.done.done()

    def grow(self) -> None:
        """Let the client use all of its volume, which has become larger since it attached."""
        self._parser.grow(self.volume.size)

    def limit(self, limiter: Limiter | None) -> None:
        """Have the limits of the volume be those of `limiter`, or none."""
        if not self._ending:
            self.gate.switch(limiter)

    def drain(self) -> None:
        """Answer what has been received, then end.

        New requests are left unread, rather than answered with ESHUTDOWN: Linux turns every
        error into EIO for the filesystem above, but repeats requests that got no reply as soon
        as it is connected again. proto.md, "Terminating the transmission phase", allows both.
        What waits for the volume's limits does so no longer: the server would be long in ending.
        """
        self._ending = True
        self.gate.switch(None)
        self._settle()

    def lose(self, fault: Exception) -> None:
        """Give the client up: drop its replies, and end the tasks where they wait.

        What a request has not done by now, it must not do any more: a client that comes again
        repeats it, and then writes newer data to the same place, over which a write that was held
        here, or a long TRIM, would come back from the past.
        """
        if self._lost:
            return
        self._lost = self._ending = True
        if not self.done.done():
            # Without the frames that it passed, which would keep buffers and this session alive.
            self.fault = fault.with_traceback(None)
        # In the next turn, since a task that has not begun could not account for its end.
        self._loop.call_soon(self._cancel_tasks)
        self._backlog = []
        self.gate.close()
        self.in_flight -= self._n_syncing
        self._n_syncing = 0
        if self._gathered is not None:
            self._gathered.drop()
            self._gathered = None
            self.in_flight -= 1
        self._outbox.clear()
        self._parser.close()
        self._receiving = 0
        if self._blocked:
            self._blocked = False
            self._channel.unwatch_writable()
        self._settle()

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _guard(self, step: Callable[..., None], *args: object) -> None:
        """Run one step of this session; what goes wrong in it ends this session only."""
        if self._lost:
            return
        try:
            step(*args)
        except (OSError, ProtocolError) as fault:
            self.lose(fault)
        except Exception as fault:
            log.exception("bug: a session on %s broke", self.volume.name)
            self.lose(fault)

    def _once_a_turn(self, step: Callable[[], None]) -> OnceATurn:
        return OnceATurn(self._loop, partial(self._guard, step))

    def _settle(self) -> None:
        """Bring reading, the backlog and the end in line with the state; after every event."""
        held = self._bytes_in_flight + self._outbox.n_bytes
        if held + self._receiving != self._account.held:
            self._account.set(held + self._receiving)
        if self._backlog:
            self._watch(False)
            if not self._run_soon.is_due and self._fits(self._backlog[0]):
                self._run_soon()  # not at once: other connections come first
        elif self.gate.held:
            self._watch(False)
        elif not self._ending:
            if self._is_short:
                self._ask_for_room()
            must_wait = self._is_short or ((held > 0 or self.in_flight > 0) and self._is_full())
            if self._reading is must_wait:
                self._watch(not must_wait)
        else:
            self._watch(False)
            self._account.stop_waiting()
            if not (self.in_flight or self._outbox.n_bytes or self._blocked or self.done.done()):
                self.done.set_result(None)

    def _watch(self, reading: bool) -> None:
        if reading is not self._reading:
            self._reading = reading
            if reading:
                self._channel.watch_readable(partial(self._guard, self._receive))
            else:
                self._channel.unwatch_readable()

    # --- Room --------------------------------------------------------------------------------

    def _held(self) -> int:
        return self._bytes_in_flight + self._outbox.n_bytes

    def _is_full(self) -> bool:
        """Whether nothing more may be begun before something ends."""
        return (
            self._outbox.n_bytes >= self._limits.max_unsent_bytes
            or self._held() >= self._limits.max_held_bytes
            or self.in_flight >= self._limits.max_in_flight
        )

    def _fits(self, request: Request) -> bool:
        """Whether there is room for a request; if that is up to others only, wait for it.

        By the session's own limits, every request fits alone.
        """
        weight, held = self._target.weigh(request), self._held()
        if (held or self.in_flight) and (
            self._is_full() or held + weight > self._limits.max_held_bytes
        ):
            self._account.stop_waiting()
            return False
        if self._account.fits(weight):
            return True
        self._account.wait()
        return False

    def _ask_for_room(self) -> None:
        """See whether there is room for the large payload that is on its way; else wait for it."""
        wanted, request = self._parser.direct_bytes, self._parser.direct_request
        if request is not None and not self.gate.begins(request):
            self._account.stop_waiting()
            return
        self._is_short = not self._account.fits(wanted)
        if self._is_short:
            self._account.wait()
        else:
            self._receiving = wanted
            self._account.set(self._account.held + wanted)
            self._account.stop_waiting()

    def stall(self, now_s: float, timeout_s: float) -> str | None:
        """Say what the client has not done for `timeout_s`, while memory waits for it; else None.

        A client that holds nothing, because it is idle or waits for us, is never stalled. To be
        asked every few seconds.
        """
        if self._blocked:
            n_unsent, n_bytes = self._channel.n_unsent(self._outbox), self._n_taken
            what = f"it does not read its replies, of which {n_unsent} bytes wait"
        elif self._reading and not self._parser.is_between_requests:
            what, n_bytes = "it stopped in the middle of a request", self._n_partial
        else:
            self._stall = None
            return None
        self._stall = Stall.seen(self._stall, now_s, n_bytes)
        stalled_s = now_s - self._stall.since_s
        return f"{what}: for {stalled_s:.0f} s" if stalled_s >= timeout_s else None

    def notice_hang_up(self) -> None:
        """Give up a client that has closed its connection while nothing was read from it.

        A session that has no room does not read, and so does not learn of the end; what it has
        begun would go on, see `lose`. To be asked every few seconds.
        """
        waits = self.n_pending and not (self._reading or self._ending or self._parser.finished)
        if waits and self._channel.has_hung_up():
            self.lose(self._left_unanswered())

    def _left_unanswered(self) -> ConnectionResetError:
        return ConnectionResetError(f"the client left {self.n_pending} requests unanswered")

    # --- Rounds ------------------------------------------------------------------------------

    def _receive(self) -> None:
        if self._gathered is not None:  # its payload lies where the next bytes go
            self._gathering.write()
            if not self._reading:
                return
        try:
            n_bytes = self._channel.recv_into(self._parser.get_buffer())
        except BlockingIOError:
            return
        if n_bytes:
            self._received(n_bytes)
            return
        # Leaving without DISC is usual (fio's probe does), unless a request is cut off.
        if not self._parser.is_between_requests:
            raise ProtocolError("the client left in the middle of a request")
        if self.in_flight:
            raise self._left_unanswered()
        self._ending = True
        self._settle()

    def _received(self, n_bytes: int) -> None:
        requests = self._parser.received(n_bytes)
        if requests:
            self.n_requests += len(requests)
            self._stall = None
            if self._receiving:
                self._receiving = 0
                self._run(requests)
                self._release()
            else:
                requests = self.gate.take(requests)
                if not (len(requests) == 1 and self._hold(requests[0])):
                    self._run(requests)
        else:
            self._n_partial += n_bytes
        if self._parser.direct_bytes != self._receiving:
            # Asked for when it is its turn: what comes before it may need that room.
            self._is_short = True
            self._settle()

    def _release(self) -> None:
        """Let go of a large payload that has been served."""
        if not self._backlog:
            self._parser.release()

    def _let_through(self, requests: list[Request]) -> None:
        """Go on with requests that the gate has held, unless their client has gone: see `lose`."""
        if not self._parser.finished and self._channel.has_hung_up():
            raise self._left_unanswered()
        self._backlog += requests
        self._settle()

    def _run_backlog(self) -> None:
        backlog, self._backlog = self._backlog, []
        self._run(backlog)
        self._release()
        if self._account.is_waiting:
            self._account.stop_waiting()  # it had its turn
            self._settle()

    def _run(self, requests: list[Request]) -> None:
        """Walk one round of requests, then send all replies at once.

        The hot loop: with the parser, it costs 0.5 to 0.8 us per request of 4 KiB in a round of
        32, and 2.0 to 2.8 us in a round of one, beside the store and the system calls (with a
        socket and a store that do nothing, on a quiet machine); 0.3 us of a round are for counting.
        """
        began_ns = perf_counter_ns()
        out = self._outbox.buffers
        reads: list[Request] = []
        writes: list[Request] = []
        flushes: list[Request] = []  # and writes with FUA: they are answered after a sync
        data: list[tuple[int, memoryview]] = []
        room = self._limits.max_held_bytes - self._bytes_in_flight - self._outbox.n_bytes
        if room > self._budget.free_for_all:
            room = min(room, self._account.room())
        left_in_round = most = self._limits.max_round_bytes
        n_out = 0
        # All of a round may become tasks, in a full pool or of what the page cache lacks, so its
        # requests are bounded, too.
        limit = self._limits.max_in_flight
        taken = requests if len(requests) <= limit else requests[:limit]
        if 1 < len(taken) < limit - self.in_flight and weigh_reads(taken) <= min(room, most):
            reads, taken = taken, []  # to walk them would tell no more, and takes 0.2 us for each
        for position, request in enumerate(taken):
            command, flags, _, offset, length, payload, verdict = request
            if verdict:
                n_out += self._target.settle(request, out)
            elif command == _WRITE and flags <= _FUA and payload is not None:
                (flushes if flags else writes).append(request)
                data.append((offset, payload))
            elif command == _FLUSH:
                flushes.append(request)
            elif command == _DISC:
                self._ending = True
            else:
                weight = length if command == _READ else self._target.weigh(request)
                must_wait = weight > room and (n_out or reads or not self._fits(request))
                if must_wait or left_in_round <= 0:
                    self._backlog = requests[position:]
                    break
                room -= weight
                left_in_round -= weight if command == _READ else round_cost(command, weight, most)
                if command == _READ:
                    reads.append(request)
                else:
                    self._start_task(request, weight)
                if self.in_flight + len(reads) >= limit:
                    self._backlog = requests[position + 1 :]
                    break
        else:
            self._backlog = requests[limit:]
        n_reads = n_writes = 0
        if reads:
            n_read_out, n_reads, n_bytes, waiting = answer_now(self._target, reads, out)
            n_out += n_read_out
            self.bytes_read += n_bytes
            for request in waiting:
                self._start_task(request, request[4])
        if not data or self._write(data, writes, flushes):
            n_writes = len(writes)
            if writes:
                n_out += self._replies.all_done(out, writes)
            if flushes:
                n_out += self._flush(flushes, out, began_ns)
        self._outbox.n_bytes += n_out
        self._send()
        self._counters.observe_round(n_reads, n_writes, perf_counter_ns() - began_ns)

    def _write(
        self, data: list[tuple[int, memoryview]], writes: list[Request], flushes: list[Request]
    ) -> bool:
        """Hand all writes of a round to the store at once; False if it cannot do that.

        Then each request goes by a task, and gets its own error, or waits.
        """
        try:
            applied = self.volume.write_now(data)
        except (StoreError, NotFound):
            applied = False
        if applied:
            self.bytes_written += sum([len(payload) for _, payload in data])
        else:
            for request in writes + flushes:
                self._start_task(request, request[4])
        return applied

    def _hold(self, request: Request) -> bool:
        """Let a lone write wait for those of other clients in this turn, if it should."""
        if self._gathered is not None or not self._gathering.wants(request):
            return False
        self._gathered = self._gathering.hold(request, partial(self._guard, self._end_hold))
        self.in_flight += 1
        return True

    def _end_hold(self, held: Held, is_done: bool) -> None:
        self._gathered = None
        self.in_flight -= 1
        if not is_done:
            self._backlog.insert(0, held.request)  # what the gate held may have come there, too
            return self._settle()
        self.bytes_written += held.request[4]
        self._outbox.n_bytes += self._replies.all_done(self._outbox.buffers, [held.request])
        self._send()
        self._counters.observe(_WRITE, 1, perf_counter_ns() - held.began_ns)

    def _flush(self, flushes: list[Request], out: list[Buffer], began_ns: int) -> int:
        """Have a round's requests that want a sync answered after it; now, if it is not needed."""
        try:
            if not self.volume.flush_soon(partial(self._guard, self._flushed, flushes, began_ns)):
                self._counters.observe_all(flushes, perf_counter_ns() - began_ns)
                return self._replies.all_done(out, flushes)
        except (StoreError, NotFound) as error:
            return sum([self._target.fail(request, error, out) for request in flushes])
        self.in_flight += len(flushes)
        self._n_syncing += len(flushes)
        return 0

    def _flushed(self, flushes: list[Request], began_ns: int, failure: StoreError | None) -> None:
        out = self._outbox.buffers
        if failure is None:
            self._counters.observe_all(flushes, perf_counter_ns() - began_ns)
            n_bytes = self._replies.all_done(out, flushes)
        else:
            n_bytes = sum([self._target.fail(request, failure, out) for request in flushes])
        self.in_flight -= len(flushes)
        self._n_syncing -= len(flushes)
        self._outbox.n_bytes += n_bytes
        self._send()

    def _send(self) -> None:
        """Send what the socket takes; the rest when it takes more."""
        if not self._blocked and self._outbox.n_bytes and not self._channel.flush(self._outbox):
            self._blocked = True
            self._channel.watch_writable(partial(self._guard, self._send_more))
        self._settle()
        if not (self._blocked or self.in_flight or self._backlog):
            self._wakefulness.replied()

    def _send_more(self) -> None:
        n_before = self._channel.n_unsent(self._outbox)
        if self._channel.flush(self._outbox):
            self._blocked = False
            self._stall = None
            self._channel.unwatch_writable()
        self._n_taken += n_before - self._channel.n_unsent(self._outbox)
        self._settle()

    # --- Tasks -------------------------------------------------------------------------------

    def _start_task(self, request: Request, weight: int) -> None:
        """Serve a request by a task, which outlives the receive buffer's content."""
        command, flags, cookie, offset, length, payload, verdict = request
        if payload is not None:
            payload = self._parser.keep(payload)
        kept = (command, flags, cookie, offset, length, payload, verdict)
        self.in_flight += 1
        self._bytes_in_flight += weight
        task = self._loop.create_task(self._serve_one(kept, weight))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_one(self, request: Request, weight: int) -> None:
        out: list[Buffer] = []
        began_ns = perf_counter_ns()
        try:
            n_bytes = await perform(self._target, request, out)
            self._counters.observe(request[0], 1, perf_counter_ns() - began_ns)
            if request[0] == _READ:
                self.bytes_read += request[4]
            elif request[0] == _WRITE:
                self.bytes_written += request[4]
            if not self._lost:
                self._outbox.buffers += out
                self._outbox.n_bytes += n_bytes
                self._send_soon()  # after all that are ready now: one group commit ends many
        except Exception as fault:
            log.exception("bug: a request on %s broke", self.volume.name)
            self.lose(fault)
        finally:
            self.in_flight -= 1
            self._bytes_in_flight -= weight
            self._settle()
