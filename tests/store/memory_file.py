"""A file in memory, for the parts of the store that need one and no more."""

from __future__ import annotations

from collections.abc import Sequence

from nbdstore.store.host import Buffer


class MemoryFile:
    """Stands in for host.File; `raw` is what it holds.

    cached: what its page cache holds, which may end before the file does.
    """

    def __init__(self, name: str = "file", raw: bytes = b"") -> None:
        self.name = name
        self.raw = bytearray(raw)
        self.cached = b""
        self.n_syncs = 0

    @property
    def size(self) -> int:
        return len(self.raw)

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        data = b"".join(buffers)
        self.raw.extend(bytes(max(0, offset + len(data) - len(self.raw))))
        self.raw[offset : offset + len(data)] = data

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.raw[offset : offset + length])

    def pread_direct(self, length: int, offset: int) -> bytes:
        assert length % 4096 == offset % 4096 == 0
        return self.pread(length, offset)

    def preadv_cached(self, buffer: Buffer, offset: int) -> int:
        found = self.cached[offset : offset + len(buffer)]
        memoryview(buffer)[: len(found)] = found
        return len(found) or -1

    def fdatasync(self) -> None:
        self.n_syncs += 1
