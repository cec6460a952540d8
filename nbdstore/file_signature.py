"""Whether a file is another one than before, for those who read files again when they change."""

from __future__ import annotations

from pathlib import Path

Signature = tuple[int, ...] | None


def signature(path: Path) -> Signature:
    """Return what tells whether a file has changed; None while it is missing."""
    try:
        info = path.stat()
    except OSError:
        return None
    # The change time tells of a new mode, too, and cannot be set back.
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
