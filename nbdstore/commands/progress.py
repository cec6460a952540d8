"""A progress bar on standard error, for a person who waits; silent when none is there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from nbdstore.commands.output import note
from nbdstore.control.model import OperationInfo
from nbdstore.control.service import VolumeService
from nbdstore.sizes import format_size

BAR_WIDTH = 24
LOOK_EVERY_S = 1
REDRAW_EVERY_S = 0.1


class Progress:
    """Show how far something of known or unknown length has come.

    Arguments:
        label: what is going on.
        total: the length, None if nobody knows.
        describe: makes an amount readable; without it, amounts are bytes.

    Use as a context manager: the bar is wiped at the end, so that the answer stands alone.
    """

    def __init__(
        self, label: str, total: int | None, describe: Callable[[float], str] = format_size
    ) -> None:
        self._label = label
        self._describe = describe
        self._total = total
        self._visible = sys.stderr.isatty()
        self._started_s = time.monotonic()
        self._drawn_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._visible and self._drawn_s:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def update(self, position: int, total: int | None = None) -> None:
        """Say that `position` is reached; `total` corrects the length."""
        self._total = total if total is not None else self._total
        now_s = time.monotonic()
        if self._visible and now_s - self._drawn_s >= REDRAW_EVERY_S:
            self._drawn_s = now_s
            sys.stderr.write("\r\x1b[K" + self._line(position, now_s - self._started_s))
            sys.stderr.flush()

    def _line(self, position: int, elapsed_s: float) -> str:
        rate = f"{self._describe(position / elapsed_s)}/s" if elapsed_s > 0 else ""
        if not self._total:
            return f"{self._label}  {self._describe(position)}  {rate}"
        part = min(position / self._total, 1.0)
        bar = ("#" * int(part * BAR_WIDTH)).ljust(BAR_WIDTH, "-")
        amount = f"{self._describe(position)} of {self._describe(self._total)}"
        return f"{self._label}  [{bar}] {part:4.0%}  {amount}  {rate}"


def follow(service: VolumeService, info: OperationInfo, when_stopped: str) -> OperationInfo:
    """Wait for the end of a long operation, showing how far it is; an interruption stops it.

    Arguments:
        when_stopped: what to tell then.
    """
    with Progress(info.kind, info.total) as progress:
        try:
            while info.is_running:
                progress.update(info.done, info.total)
                info = service.operation(info.id, wait_s=LOOK_EVERY_S)
        except KeyboardInterrupt:
            service.cancel_operation(info.id)
            note(when_stopped)
            raise
    return info
