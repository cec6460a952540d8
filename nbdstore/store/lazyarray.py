"""Large arrays that cost no memory until they are touched.

Owns the anonymous mappings behind the in-memory maps; knows nothing of what is in them.

Why not ``numpy.zeros``: a 10 TiB volume's map spans 40 GiB of address space, which the kernel's
overcommit check may refuse (MAP_NORESERVE is not counted in overcommit modes 0 and 1), and numpy
asks for huge pages on large arrays, so that one touched leaf would cost 2 MiB instead of 4 KiB.
Owning the mapping also lets single leaves be given back with MADV_DONTNEED, after which they
read as zeros again.
"""

from __future__ import annotations

import mmap
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nbdstore.errors import StoreError
from nbdstore.sizes import exact_size

# Python names MAP_NORESERVE from 3.13 on; 0x4000 is its value on every architecture of Debian
# but alpha, mips and powerpc.
_MAP_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000)


class LazyArray:
    """A zero-filled array over an anonymous mapping.

    Attributes:
        array: the numpy view, of the shape and dtype asked for.
        memory: the same bytes as a memoryview, for scalar access cheaper than numpy's.
    """

    __slots__ = ("_map", "array", "memory")

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        item = np.dtype(dtype)
        n_items = 1
        for n in shape:
            n_items *= n
        n_bytes = max(n_items * item.itemsize, 1)
        n_bytes += -n_bytes % mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._map = mmap.mmap(-1, n_bytes, flags=flags)
        except OSError as error:
            raise StoreError(
                f"no address space for a map of {exact_size(n_bytes)} ({error.strerror}): raise "
                "the process's memory limit, or set vm.overcommit_memory to 0 or 1"
            ) from error
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_NOHUGEPAGE)
            except OSError:
                pass  # a kernel without huge pages has none to refuse
        self.memory = memoryview(self._map)
        self.array: npt.NDArray[Any] = np.frombuffer(self._map, item, n_items).reshape(shape)

    def forget(self, start: int, stop: int) -> None:
        """Make bytes `[start, stop)` zero and give their memory back; both page-aligned."""
        self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
