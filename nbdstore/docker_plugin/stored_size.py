"""How large a volume is in the store now, if the store says so at once.

Docker is told a volume's size when it looks, and it may have been resized since it was made. But
looking must never wait for a server (see `driver`): so one is asked by a thread of its own, and
while a question is open for longer than `PATIENCE_S`, no other is asked.
"""

from __future__ import annotations

import threading
from typing import Final

from nbdstore.control.service import VolumeService
from nbdstore.errors import NbdstoreError

PATIENCE_S: Final = 1.0
"""Much longer than an answer takes, and short beside the minute that Docker waits."""


class StoredSizes:
    """Ask `service`; safe for many threads."""

    def __init__(self, service: VolumeService) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._open: threading.Thread | None = None

    def of(self, name: str) -> int:
        """Return a volume's size in bytes; 0 if there is none, or no answer within `PATIENCE_S`."""
        sizes: list[int] = []

        def ask() -> None:
            try:
                sizes.append(self._service.volume(name).size)
            except NbdstoreError:
                return  # deleted, or the server is away: who looks is told what is remembered

        with self._lock:
            if self._open is not None and self._open.is_alive():
                return 0
        thread = threading.Thread(target=ask, name=f"size of {name}", daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        if thread.is_alive():
            with self._lock:
                self._open = thread
        return next(iter(sizes), 0)
