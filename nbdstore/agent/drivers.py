"""Which driver a machine has: the kernel's, or else nbdfuse and a loop device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from nbdstore.agent import fuse_driver, kernel_driver, tls
from nbdstore.agent.driver import Driver
from nbdstore.errors import DeviceError, InvalidArgument

AUTO: Final = "auto"
NAMES: Final = (AUTO, "kernel", "fuse")
WHY_UNAVAILABLE: Final = {
    "kernel": kernel_driver.why_unavailable,
    "fuse": fuse_driver.why_unavailable,
}

log = logging.getLogger(__name__)


class Drivers:
    """The drivers by name, and which of them "auto" is; that is found out once, when asked."""

    def __init__(self, drivers: Mapping[str, Driver]) -> None:
        self._drivers = drivers
        self._automatic: Driver | None = None

    def __getitem__(self, name: str) -> Driver:
        return self._drivers[name]

    def choose(self, name: str = AUTO, *, with_tls: bool = False) -> Driver:
        """Return the driver of a name, or the one for this machine, and for TLS if that is wanted.

        Raises:
            DeviceError: this machine has none.
            InvalidArgument: there is none of that name.
        """
        if with_tls and name == "kernel":
            raise DeviceError(tls.KERNEL_CANNOT)
        if with_tls and name == AUTO:
            name = "fuse"
        if name == AUTO:
            self._automatic = self._automatic or self._find()
            return self._automatic
        if name not in self._drivers:
            raise InvalidArgument(f"there is no driver '{name}': give {', '.join(NAMES)}")
        if (reason := WHY_UNAVAILABLE[name]()) is not None:
            raise DeviceError(f"this machine cannot attach with the {name} driver: {reason}")
        return self._drivers[name]

    def _find(self) -> Driver:
        reason = kernel_driver.why_unavailable()
        if reason is None:
            return self._drivers["kernel"]
        lacking = fuse_driver.why_unavailable()
        if lacking is not None:
            raise DeviceError(
                f"this machine cannot attach volumes: {reason}; and nbdfuse cannot do it: {lacking}"
            )
        log.warning("attaching with nbdfuse and loop devices, which is slower: %s", reason)
        return self._drivers["fuse"]
