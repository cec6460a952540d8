"""Every command and flag that libnbd has, one by one, through its shell."""

from __future__ import annotations

import pytest

from tests.children import Children
from tests.clients.libnbd import nbdsh
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires("nbdsh")

BASE = ("base:allocation",)


def test_bytes_at_odd_places_match_a_model(served: ServedPool, children: Children) -> None:
    script = """
    source = random.Random(1)
    size = 1 << 20
    model = bytearray(size)
    for step in range(600):
        offset = source.randrange(size)
        length = source.randint(1, min(size - offset, source.choice([10, 5000, 70000])))
        what = source.choice(["write", "write", "zero", "no_hole", "trim", "read"])
        if what == "write":
            data = source.randbytes(length)
            h.pwrite(data, offset)
            model[offset : offset + length] = data
        elif what == "zero" or what == "no_hole":
            h.zero(length, offset, nbd.CMD_FLAG_NO_HOLE if what == "no_hole" else 0)
            model[offset : offset + length] = bytes(length)
        elif what == "trim":
            # What a trim leaves at the edges of blocks is for the server to choose.
            offset, length = offset // 4096 * 4096, 8192 if offset < size - 8192 else 0
            if length:
                h.trim(length, offset)
                model[offset : offset + length] = bytes(length)
        assert h.pread(length, offset) == model[offset : offset + length] if length else True, step
    assert h.pread(size, 0) == model
    """
    nbdsh(children, served.uri(), script)


def test_every_command_takes_fua(served: ServedPool, children: Children) -> None:
    script = """
    h.set_strict_mode(STRICT_NOTHING)
    h.pwrite(b"x" * 8192, 0, nbd.CMD_FLAG_FUA)
    h.zero(4096, 0, nbd.CMD_FLAG_FUA)
    h.trim(4096, 4096, nbd.CMD_FLAG_FUA)
    assert h.pread(8192, 0, nbd.CMD_FLAG_FUA) == bytes(8192)
    h.flush(nbd.CMD_FLAG_FUA)
    h.cache(8192, 0, nbd.CMD_FLAG_FUA)
    """
    nbdsh(children, served.uri(), script)


def test_block_sizes_are_announced(served: ServedPool, children: Children) -> None:
    script = """
    same(h.get_block_size(nbd.SIZE_MINIMUM), 1)
    same(h.get_block_size(nbd.SIZE_PREFERRED), 4096)
    same(h.get_block_size(nbd.SIZE_MAXIMUM), 32 << 20)
    """
    nbdsh(children, served.uri(), script)


def test_a_read_has_a_chunk_for_each_piece(served: ServedPool, children: Children) -> None:
    script = """
    assert h.get_structured_replies_negotiated()
    h.pwrite(b"x" * 8192, 65536)
    same(chunks(131072, 0), [
        (0, 65536, nbd.READ_HOLE),
        (65536, 8192, nbd.READ_DATA),
        (73728, 57344, nbd.READ_HOLE),
    ])
    """
    nbdsh(children, served.uri(), script)


def test_a_read_that_must_not_be_split_is_one_chunk(served: ServedPool, children: Children) -> None:
    script = """
    h.pwrite(b"x" * 8192, 8192)
    same(chunks(65536, 0, nbd.CMD_FLAG_DF), [(0, 65536, nbd.READ_DATA)])
    """
    nbdsh(children, served.uri(), script)


def test_simple_replies_carry_the_same_bytes(served: ServedPool, children: Children) -> None:
    script = f"""
    h.set_request_structured_replies(False)
    h.connect_uri({served.uri()!r})
    assert not h.get_structured_replies_negotiated()
    h.pwrite(b"x" * 5000, 5000)
    assert h.pread(20000, 0) == bytes(5000) + b"x" * 5000 + bytes(10000)
    """
    nbdsh(children, "", script)


def test_requests_of_32_mib(served: ServedPool, children: Children) -> None:
    script = """
    data = random.Random(2).randbytes(32 << 20)
    h.pwrite(data, 12345)
    assert h.pread(32 << 20, 12345) == data
    """
    nbdsh(children, served.uri(), script)


def test_a_read_that_is_too_large_is_refused_and_the_connection_lives(
    served: ServedPool, children: Children
) -> None:
    script = """
    h.set_strict_mode(STRICT_NOTHING)
    try:
        h.pread((32 << 20) + 1, 0)
    except nbd.Error as error:
        assert error.errno in ("EINVAL", "EOVERFLOW"), error
    assert h.pread(512, 0) == bytes(512)
    """
    nbdsh(children, served.uri(), script)


def test_the_error_of_each_command_beyond_the_end(served: ServedPool, children: Children) -> None:
    script = """
    h.set_strict_mode(STRICT_NOTHING)
    end = h.get_size()
    expect("EINVAL", h.pread, 512, end)
    expect("EINVAL", h.pread, 512, end - 511)
    expect("ENOSPC", h.pwrite, b"x" * 512, end - 511)
    expect("ENOSPC", h.zero, 512, end)
    expect("EINVAL", h.trim, 512, end)
    expect("EINVAL", h.cache, 512, end)
    expect("EINVAL", extents, 512, end)
    expect("EINVAL", h.pread, 512, 1 << 63)
    assert h.pread(512, end - 512) == bytes(512)
    """
    nbdsh(children, served.uri(), script, contexts=BASE)


def test_flags_that_a_command_does_not_know(served: ServedPool, children: Children) -> None:
    script = """
    h.set_strict_mode(STRICT_NOTHING)
    expect("EINVAL", h.pread, 512, 0, nbd.CMD_FLAG_NO_HOLE)
    expect("EINVAL", h.pwrite, b"x" * 512, 0, nbd.CMD_FLAG_DF)
    expect("EINVAL", h.trim, 4096, 0, nbd.CMD_FLAG_NO_HOLE)
    expect("EINVAL", h.zero, 4096, 0, nbd.CMD_FLAG_REQ_ONE)
    expect("EINVAL", h.cache, 4096, 0, nbd.CMD_FLAG_FAST_ZERO)
    expect("EINVAL", h.flush, 1 << 15)
    assert h.pread(512, 0) == bytes(512)
    """
    nbdsh(children, served.uri(), script)


def test_a_read_only_export_refuses_every_change(pool: ServedPool, children: Children) -> None:
    pool.start("--read-only")
    script = """
    h.set_strict_mode(STRICT_NOTHING)
    assert h.is_read_only()
    expect("EPERM", h.pwrite, b"x" * 512, 0)
    expect("EPERM", h.pwrite, b"x" * 512, h.get_size())
    expect("EPERM", h.zero, 512, 0)
    expect("EPERM", h.trim, 512, 0)
    assert h.pread(512, 0) == bytes(512)
    """
    nbdsh(children, pool.uri(), script)


def test_requests_of_no_length_do_not_end_the_connection(
    served: ServedPool, children: Children
) -> None:
    script = """
    h.set_strict_mode(STRICT_NOTHING)
    for call in (lambda: h.pwrite(b"", 0), lambda: h.trim(0, 0), lambda: h.zero(0, 0),
                 lambda: h.cache(0, 0), lambda: extents(0, 0)):
        try:
            call()
        except nbd.Error as error:
            assert error.errno == "EINVAL", error
    assert h.pread(512, 0) == bytes(512)
    """
    nbdsh(children, served.uri(), script, contexts=BASE)


def test_the_allocation_of_each_kind_of_extent(served: ServedPool, children: Children) -> None:
    script = """
    h.pwrite(b"x" * 8192, 8192)
    h.zero(8192, 16384, nbd.CMD_FLAG_NO_HOLE)
    hole, zero = nbd.STATE_HOLE, nbd.STATE_ZERO
    same(extents(65536, 0), {"base:allocation": [
        (8192, hole | zero), (8192, 0), (8192, zero), (40960, hole | zero),
    ]})
    same(extents(65536, 4096, nbd.CMD_FLAG_REQ_ONE), {"base:allocation": [(4096, hole | zero)]})
    same(extents(4096, 10000, nbd.CMD_FLAG_REQ_ONE), {"base:allocation": [(4096, 0)]})
    h.trim(65536, 0)
    same(extents(65536, 0), {"base:allocation": [(65536, hole | zero)]})
    """
    nbdsh(children, served.uri(), script, contexts=BASE)


def test_the_depth_of_allocated_extents_is_one(served: ServedPool, children: Children) -> None:
    script = """
    h.pwrite(b"x" * 4096, 4096)
    depths = extents(16384, 0)["qemu:allocation-depth"]
    same(depths, [(4096, 0), (4096, 1), (8192, 0)])
    """
    nbdsh(children, served.uri(), script, contexts=(*BASE, "qemu:allocation-depth"))


def test_block_status_without_a_context_is_an_error(served: ServedPool, children: Children) -> None:
    script = """
    h.set_strict_mode(STRICT_NOTHING)
    expect("EINVAL", extents, 512, 0)
    """
    nbdsh(children, served.uri(), script, contexts=("x-unknown:context",))


def test_zeroing_is_fast_whatever_is_there(served: ServedPool, children: Children) -> None:
    script = """
    h.pwrite(b"x" * (1 << 20), 0)
    h.zero(1 << 30, 0, nbd.CMD_FLAG_FAST_ZERO)
    same(extents(1 << 30, 0)["base:allocation"], [(1 << 30, 3)])
    """
    nbdsh(children, served.uri(), script, contexts=BASE)


def test_a_write_on_one_connection_is_read_on_another(
    served: ServedPool, children: Children
) -> None:
    script = f"""
    assert h.can_multi_conn()
    other = nbd.NBD()
    other.connect_uri({served.unix_uri()!r})
    for round in range(200):
        data = random.Random(round).randbytes(4096)
        h.pwrite(data, round * 4096)
        other.flush()
        assert other.pread(4096, round * 4096) == data
        h, other = other, h
    """
    nbdsh(children, served.uri(), script)


def test_many_requests_in_flight(served: ServedPool, children: Children) -> None:
    script = """
    source = random.Random(3)
    blocks = {n: source.randbytes(source.choice([512, 4096, 65536])) for n in range(200)}
    def finish(cookies):
        while cookies:
            h.poll(-1)
            cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]
    finish([h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), n << 16)
            for n, data in blocks.items()] + [h.aio_flush()])
    buffers = {n: nbd.Buffer(len(data)) for n, data in blocks.items()}
    finish([h.aio_pread(buffer, n << 16) for n, buffer in buffers.items()])
    for n, buffer in buffers.items():
        assert buffer.to_bytearray() == blocks[n], n
    """
    nbdsh(children, served.uri(), script)


def test_the_far_end_of_a_large_volume(served: ServedPool, children: Children) -> None:
    served.create_volume("large", "16T")
    script = """
    end = h.get_size()
    assert end == 16 << 40
    h.pwrite(b"x" * 1000, end - 1000)
    assert h.pread(2000, end - 2000) == bytes(1000) + b"x" * 1000
    for offset in range(0, 64 << 30, 2 << 30):
        h.trim(2 << 30, offset)
    h.zero(2 << 30, end - (2 << 30))
    assert h.pread(2000, end - 2000) == bytes(2000)
    """
    nbdsh(children, served.uri("large"), script)


def test_options_come_in_any_order_and_fail_without_harm(
    served: ServedPool, children: Children
) -> None:
    script = f"""
    h.set_opt_mode(True)
    h.connect_tcp("127.0.0.1", "{served.port}")
    names = []
    h.opt_list(lambda name, description: names.append(name))
    same(names, ["disk"])
    h.set_export_name("no-such-disk")
    expect("ENOENT", h.opt_info)
    expect("ENOENT", h.opt_go)
    h.set_export_name("disk")
    h.opt_info()
    size = h.get_size()
    h.opt_go()
    assert h.get_size() == size == 1 << 30
    h.pwrite(b"x" * 512, 0)
    """
    nbdsh(children, "", script)


def test_a_connection_can_be_given_up_before_it_has_chosen(
    served: ServedPool, children: Children
) -> None:
    script = f"""
    h.set_opt_mode(True)
    h.connect_tcp("127.0.0.1", "{served.port}")
    h.opt_abort()
    """
    nbdsh(children, "", script)
