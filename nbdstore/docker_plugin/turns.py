"""One thing at a time for each volume, and none that Docker waits for longer than it does.

Docker gives a plugin one or two minutes and then forgets the call, which goes on. So work is done
by a thread of its own: who waits for it gets its result, or is told that it goes on and may ask
again; asked for the same again, it waits for the work under way instead of doing it twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from nbdstore.errors import Busy

Result = TypeVar("Result")


class _Work:
    """What one thread does for one volume."""

    def __init__(self, what: str, do: Callable[[], object]) -> None:
        self.what = what
        self.since_s = time.monotonic()
        self.failure: BaseException | None = None
        self.result: object = None
        self._do = do
        self.done = threading.Event()

    def run(self) -> None:
        try:
            self.result = self._do()
        except BaseException as error:
            self.failure = error
        finally:
            self.done.set()


class Turns:
    """The work under way, by volume."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: dict[str, _Work] = {}

    def take(self, name: str, what: str, do: Callable[[], Result], *, patience_s: float) -> Result:
        """Do something for a volume, after what is done for it now.

        Arguments:
            what: names it ("mounting"); the same name is the same work.
            patience_s: for both.

        Raises:
            Busy: it, or what is done now, takes longer; it goes on.
            Exception: what `do` raises.
        """
        deadline_s = time.monotonic() + patience_s
        while True:
            with self._lock:
                work = self._works.get(name)
                if work is None or work.done.is_set():
                    work = self._works[name] = _Work(what, do)
                    threading.Thread(target=work.run, name=f"{what} {name}", daemon=True).start()
            finished = work.done.wait(max(0.0, deadline_s - time.monotonic()))
            if not finished:
                age_s = time.monotonic() - work.since_s
                raise Busy(
                    f"{work.what} volume {name} is under way for {age_s:.0f} s and goes on: see "
                    "'nbdstore agent status', and try again"
                )
            if work.what == what:
                if work.failure is not None:
                    raise work.failure
                return work.result  # type: ignore[return-value]
