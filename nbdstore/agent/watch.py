"""The watch: it notices what needs care, and has the agent tend it, for as long as an agent runs.

    at once      the kernel says that a device lost its connection (LINK_DEAD)
    every tick   what has no connection, no device, or is being detached; what failed before is
                 tried again, less and less often
    every poll   sizes: what has grown in the store grows here; a filesystem that could not is
                 tried again after minutes, for that takes somebody to change something

Attachments are tended by a few threads, so that one that waits for its server holds up no other.
Looking at all of them costs a read from sysfs for each; none is ever waited for.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from nbdstore.agent.agent import Agent
from nbdstore.agent.attachments import Attachment, AtWork
from nbdstore.agent.driver import Health
from nbdstore.agent.nbd_family import DeadLinks
from nbdstore.agent.requests import MountRequest
from nbdstore.errors import NbdstoreError

TICK_S: Final = 1.0
POLL_S: Final = 5.0
N_THREADS: Final = 8
FIRST_RETRY_S: Final = 0.2
LAST_RETRY_S: Final = 5.0
LAST_FILESYSTEM_RETRY_S: Final = 300.0

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Care:
    """The course of an attachment that needs care. said: the problem that was logged last."""

    last_pause_s: float = LAST_RETRY_S
    running: concurrent.futures.Future[None] | None = None
    next_s: float = 0.0
    pause_s: float = FIRST_RETRY_S
    said: str = ""


class Watch:
    """Watches the attachments of `agent`, from `start` to `stop`."""

    def __init__(self, agent: Agent, wanted: Sequence[MountRequest] = ()) -> None:
        self._agent = agent
        for request in wanted:
            agent.pending[request.volume, request.path] = (request, "not tried yet")
        self._care: dict[str, _Care] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(N_THREADS, "tending")
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopping = False
        self._next_poll_s = 0.0
        self._server_away = False
        self._events = _events()

    def start(self) -> None:
        """Tend all attachments once, then keep watching."""
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing more, and wait for what is being done."""
        self._stopping = True
        self.wake()
        self._thread.join()
        self._pool.shutdown()
        if self._events is not None:
            self._events.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def wake(self) -> None:
        """Look now, not at the next tick."""
        try:
            os.write(self._wake_writer, b"\0")
        except BlockingIOError:
            pass  # it is full: somebody has woken it already

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._look()
            except Exception:
                # A bug in looking at one thing must not end the care for all others.
                log.exception("the watch has a bug")
            self._wait()

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._wake_reader, select.POLLIN)
        if self._events is not None:
            poll.register(self._events, select.POLLIN)
        for descriptor, _ in poll.poll(TICK_S * 1000):
            if descriptor == self._wake_reader:
                os.read(self._wake_reader, 4096)
            elif self._events is not None and (lost := self._events.take()) is not None:
                log.info("connections lost: %s", ", ".join(f"nbd{index}" for index in lost))

    def _look(self) -> None:
        for attachment in self._agent.attachments.all():
            self._look_at(attachment)
        for (volume, path), (request, _) in list(self._agent.pending.items()):
            self._begin(f"{volume} at {path}", functools.partial(self._mount, request))
        now_s = time.monotonic()
        if now_s >= self._next_poll_s:
            self._next_poll_s = now_s + POLL_S
            self._compare_sizes()

    def _look_at(self, attachment: Attachment) -> None:
        volume = attachment.record.volume
        if not self._agent.needs_care(attachment):
            self._care.pop(volume, None)
            attachment.waiting_since_s = None
            return
        now_s = time.monotonic()
        if self._agent.attaching.health(attachment, glance=True) is Health.WAITING:
            attachment.waiting_since_s = attachment.waiting_since_s or now_s
            if now_s - attachment.waiting_since_s > attachment.record.dead_timeout_s:
                attachment.expired = True
        self._begin(volume, functools.partial(self._agent.tend, volume))

    def _begin(
        self, subject: str, work: Callable[[], None], last_pause_s: float = LAST_RETRY_S
    ) -> None:
        """Have something done by a thread, unless it is being done, or failed just now."""
        care = self._care.setdefault(subject, _Care(last_pause_s))
        idle = care.running is None or care.running.done()
        if idle and time.monotonic() >= care.next_s:
            care.running = self._pool.submit(self._do, subject, care, work)

    def _do(self, subject: str, care: _Care, work: Callable[[], None]) -> None:
        try:
            work()
        except AtWork:
            return  # whoever it is brings it about, or the next look finds it undone
        except NbdstoreError as error:
            if str(error) != care.said:
                care.said = str(error)
                log.warning("volume %s: %s", subject, error)
        except Exception:
            log.exception("tending volume %s has a bug", subject)
        care.next_s = time.monotonic() + care.pause_s
        care.pause_s = min(care.pause_s * 2, care.last_pause_s)

    def _mount(self, request: MountRequest) -> None:
        """Mount what this agent was started to mount; it is tried until it succeeds once."""
        key = (request.volume, request.path)
        try:
            self._agent.mount(request)
        except NbdstoreError as error:
            self._agent.pending[key] = (request, str(error))
            raise
        self._agent.pending.pop(key, None)

    def _compare_sizes(self) -> None:
        attachments = [item for item in self._agent.attachments.all() if item.device is not None]
        if not attachments:
            return
        try:
            sizes = {info.uuid: info.size for info in self._agent.server.volumes()}
        except NbdstoreError as error:
            if not self._server_away:
                log.warning("the server is away: %s", error)
            self._server_away = True
            return
        if self._server_away:
            log.info("the server is back")
        self._server_away = False
        for attachment in attachments:
            volume = attachment.record.volume
            size = sizes.get(attachment.record.volume_uuid, 0)
            grow = functools.partial(self._agent.grow, volume, size)
            subject = f"{volume}'s device"
            if attachment.device is not None and size > attachment.device.size:
                self._begin(subject, grow)
            else:
                self._care.pop(subject, None)
            subject = f"{volume}'s filesystem"
            if attachment.record.too_small:
                self._begin(subject, grow, LAST_FILESYSTEM_RETRY_S)
            else:
                self._care.pop(subject, None)


def _events() -> DeadLinks | None:
    """Open the stream of events; None where the kernel has no nbd, and a tick has to do."""
    try:
        return DeadLinks()
    except OSError as error:
        log.debug("no events of the nbd driver: %s", error)
        return None
