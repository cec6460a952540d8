"""Arrays that cost no memory until they are touched."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from nbdstore.errors import StoreError
from nbdstore.store.lazyarray import LazyArray

PAGE = mmap.PAGESIZE


def resident_bytes() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


def test_it_reads_as_zeros_of_the_shape_and_type_asked_for() -> None:
    lazy = LazyArray((5, 2), "<u8")
    assert lazy.array.shape == (5, 2)
    assert lazy.array.dtype == np.uint64
    assert not lazy.array.any()


def test_array_and_memory_are_the_same_bytes() -> None:
    lazy = LazyArray((4,), np.uint64)
    lazy.array[2] = 7
    assert lazy.memory.cast("Q")[2] == 7
    lazy.memory.cast("Q")[3] = 9
    assert lazy.array[3] == 9


def test_an_empty_array_is_possible() -> None:
    assert LazyArray((0,), np.uint8).array.shape == (0,)


def test_a_huge_array_costs_nothing_until_it_is_touched() -> None:
    before = resident_bytes()
    lazy = LazyArray((1 << 37,), np.uint64)  # a TiB: more than any test machine has
    for index in range(0, 1 << 37, 1 << 30):
        lazy.array[index] = 1
    assert resident_bytes() - before < 16 << 20
    assert int(lazy.array[5 << 30]) == 1


def test_what_is_forgotten_is_zero_again_and_costs_nothing() -> None:
    before = resident_bytes()
    lazy = LazyArray((64 << 20,), np.uint8)
    lazy.array[:] = 1
    assert resident_bytes() - before > 60 << 20
    lazy.forget(PAGE, 64 << 20)
    assert resident_bytes() - before < 8 << 20
    assert lazy.array[:PAGE].all()
    assert not lazy.array[PAGE:].any()


def test_more_than_the_address_space_is_a_store_error() -> None:
    with pytest.raises(StoreError, match="address space"):
        LazyArray((1 << 60,), np.uint8)
