"""What the nbd driver is told, as bytes; that it understands them is shown in test_guest.py."""

from __future__ import annotations

import struct

from nbdstore.agent import nbd_family
from nbdstore.agent.nbd_family import Connect, encode_sockets, parse_devices
from nbdstore.agent.netlink import attribute, attributes, number, u32


def test_connect_names_all_that_it_must() -> None:
    connect = Connect(
        identifier="nbdstore:a:db:1",
        size=1 << 40,
        block_size=4096,
        flags=0x56D,
        request_timeout_s=10,
        dead_timeout_s=3600,
        sockets=[5, 6],
    )
    found = dict(attributes(connect.encode()))
    numbers = {kind: number(value) for kind, value in found.items() if len(value) == 8}
    assert numbers == {2: 1 << 40, 3: 4096, 4: 10, 5: 0x56D, 8: 3600}
    assert found[10] == b"nbdstore:a:db:1\0"
    items = [dict(attributes(item)) for _, item in attributes(found[7])]
    assert items == [{1: struct.pack("=I", 5)}, {1: struct.pack("=I", 6)}]
    assert encode_sockets([]) == struct.pack("=HH", 4, 7)


def test_status_tells_which_devices_are_configured() -> None:
    def item(index: int, connected: int) -> bytes:
        return attribute(1, u32(1, index) + attribute(2, bytes([connected])))

    listing = attribute(nbd_family.DEVICE_LIST, item(0, 1) + item(1, 0) + item(16, 1))
    assert parse_devices(listing) == {0: True, 1: False, 16: True}
    assert parse_devices(b"") == {}
