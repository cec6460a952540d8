"""What ``docker volume create -d nbdstore -o KEY=VALUE`` may say.

::

    size     of a new volume, as in 10G; needed, unless the plugin was given a default
    fs       ext4 or xfs: what a new volume is formatted with when it is first mounted
    clone    VOLUME@SNAPSHOT: what a new volume starts from, instead of nothing
    options  of mount(8), with commas
    owner    UID:GID, and mode, octal: of the root directory of a new filesystem
    iops     and bandwidth (bytes per second, as in 100M): limits, for all clients together
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from nbdstore.errors import InvalidArgument
from nbdstore.sizes import parse_size

FILESYSTEMS = ("ext4", "xfs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeOptions:
    """The options of a volume; sizes in bytes, 0 and "" = not said."""

    size: int = 0
    fs: str = ""
    clone: str = ""
    options: str = ""
    owner: str = ""
    mode: str = ""
    iops: int = 0
    bandwidth: int = 0

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Self:
        """Read the options as Docker hands them on.

        Raises:
            InvalidArgument: which one makes no sense, and what would.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, text in given.items():
            if key not in known:
                raise InvalidArgument(
                    f"there is no option '{key}': there are {', '.join(sorted(known))}"
                )
            values[key] = _value(key, text)
        options = cls(**values)
        if options.fs and options.fs not in FILESYSTEMS:
            raise InvalidArgument(f"fs={options.fs}: give {' or '.join(FILESYSTEMS)}")
        if options.clone and "@" not in options.clone:
            raise InvalidArgument(f"clone={options.clone}: give VOLUME@SNAPSHOT")
        return options

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain JSON values."""
        return dataclasses.asdict(self)


def _value(key: str, text: str) -> int | str:
    try:
        if key in ("size", "bandwidth"):
            return parse_size(text)
        if key == "iops":
            return _count(text)
    except InvalidArgument as error:
        raise InvalidArgument(f"{key}={text}: {error}") from error
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise InvalidArgument("give a number")
    return int(text)
