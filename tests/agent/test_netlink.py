"""Netlink messages as bytes; and the kernel's own "ctrl" family, which every Linux has."""

from __future__ import annotations

import struct

import pytest

from nbdstore.agent import netlink
from nbdstore.agent.netlink import GenericNetlink, attribute, attributes, parse, text, u32, u64


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (u32(1, 7), struct.pack("=HHI", 8, 1, 7)),
        (u64(2, 1 << 40), struct.pack("=HHQ", 12, 2, 1 << 40)),
        (text(10, "abc"), struct.pack("=HH", 8, 10) + b"abc\0"),
        (text(10, "abcd"), struct.pack("=HH", 9, 10) + b"abcd\0\0\0\0"),
        (attribute(3, b""), struct.pack("=HH", 4, 3)),
    ],
)
def test_attributes_are_padded_and_their_length_is_not(built: bytes, expected: bytes) -> None:
    assert built == expected


def test_attributes_come_back() -> None:
    data = u32(1, 7) + text(10, "abcd") + u64(2, 9)
    found = [(1, struct.pack("=I", 7)), (10, b"abcd\0"), (2, struct.pack("=Q", 9))]
    assert list(attributes(data)) == found
    nested = attribute(0x8000 | 5, data)
    ((kind, value),) = attributes(nested)
    assert (kind, value) == (5, data), "the flag for nested attributes is no part of the type"


@pytest.mark.parametrize("n_bytes", range(1, 12))
def test_cut_attributes_are_refused(n_bytes: int) -> None:
    with pytest.raises(ValueError, match="netlink attribute"):
        list(attributes(u64(2, 9)[:n_bytes]))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_numbers_of_all_widths(width: int) -> None:
    layout = {1: "=B", 2: "=H", 4: "=I", 8: "=Q"}[width]
    assert netlink.number(struct.pack(layout, 200)) == 200


def test_messages_are_split() -> None:
    request = netlink.build(0x20, 3, u32(1, 5), 77)
    refused = struct.pack("=IHHIIi", 20, 2, 0, 78, 0, -22)
    done = struct.pack("=IHHIIi", 20, 2, 0, 79, 0, 0)
    first, second, third = parse(request + refused + done)
    assert first == (0x20, 77, 3, u32(1, 5), None)
    assert (second.sequence, second.error) == (78, 22)
    assert (third.sequence, third.error) == (79, 0)


@pytest.mark.parametrize("cut", range(1, 20))
def test_cut_messages_are_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="netlink message"):
        list(parse(struct.pack("=IHHIIi", 20, 2, 0, 78, 0, -22)[:cut]))


def test_the_kernel_answers() -> None:
    sock = GenericNetlink()
    family = sock.family("nlctrl")
    assert family.number == netlink.CTRL_FAMILY
    assert "notify" in family.groups
    with pytest.raises(FileNotFoundError):
        sock.family("no-such-family")
    sock.join(family.groups["notify"])
    assert sock.events() == []
    sock.close()
