"""What records say survives the way through bytes, and nonsense is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstore.errors import Corruption
from nbdstore.store import records
from nbdstore.store.records import Group, Op

words = st.integers(0, (1 << 64) - 1)


def parsed(*groups: bytes) -> list[Group]:
    return list(records.parse(memoryview(b"".join(groups)), "record 1"))


@given(st.integers(0, (1 << 32) - 1), st.lists(st.tuples(words, words, words)))
def test_a_map_group_round_trips(volume: int, rows: list[tuple[int, int, int]]) -> None:
    mapping = np.array(rows, np.uint64).reshape(-1, 3)
    (group,) = parsed(records.map_group(volume, mapping))
    assert (group.op, group.volume, group.count) == (Op.MAP, volume, len(rows))
    assert group.mapping().tolist() == mapping.tolist()


@given(st.sampled_from([Op.CLEAR, Op.PROVISION]), st.lists(st.tuples(words, words)))
def test_a_range_group_round_trips(op: Op, ranges: list[tuple[int, int]]) -> None:
    (group,) = parsed(records.range_group(op, 3, ranges))
    assert (group.op, group.volume, group.ranges()) == (op, 3, ranges)


@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.binary(min_size=512, max_size=512))))
def test_a_data_group_round_trips(pairs: list[tuple[int, bytes]]) -> None:
    slots = np.array([slot for slot, _ in pairs], np.int64)
    (group,) = parsed(records.data_group(slots, [block for _, block in pairs]))
    assert group.volume == 0
    assert {slot: bytes(block) for slot, block in group.data(512).items()} == dict(pairs)


@given(
    st.dictionaries(
        st.text(), st.recursive(st.integers() | st.text() | st.none(), st.lists, max_leaves=5)
    )
)
def test_an_admin_group_round_trips_and_stays_aligned(change: dict[str, object]) -> None:
    raw = records.admin_group(9, change)
    assert len(raw) % 8 == 0
    (group,) = parsed(raw)
    assert (group.volume, group.admin()) == (9, change)


def test_groups_come_in_order() -> None:
    groups = parsed(
        records.range_group(Op.CLEAR, 1, [(1, 2)]),
        records.map_group(2, np.array([[1, 2, 3]], np.uint64)),
        records.admin_group(3, {"op": "x"}),
        records.data_group(np.array([5], np.int64), [bytes(512)]),
        records.range_group(Op.PROVISION, 4, [(1, 2), (3, 4)]),
    )
    assert [(g.op, g.volume) for g in groups] == [
        (Op.CLEAR, 1),
        (Op.MAP, 2),
        (Op.ADMIN, 3),
        (Op.DATA, 0),
        (Op.PROVISION, 4),
    ]


def test_an_empty_payload_has_no_groups() -> None:
    assert parsed() == []


HEADER = struct.Struct("<HHIII")
NONSENSE = {
    "half a header": bytes(7),
    "unknown op 0": HEADER.pack(0, 0, 1, 0, 0),
    "unknown op 6": HEADER.pack(6, 0, 1, 0, 0),
    "body beyond the end": HEADER.pack(Op.CLEAR, 0, 1, 1, 16) + bytes(8),
}


@pytest.mark.parametrize("raw", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_corruption(raw: bytes) -> None:
    with pytest.raises(Corruption):
        parsed(raw)
