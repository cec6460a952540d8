"""Leases with real clients: a fenced one never writes again, a killed server forgets nothing."""

from __future__ import annotations

import json
import sys
import threading

import pytest

from nbdstore.control.client import ControlClient
from nbdstore.control.model import LeaseInfo
from nbdstore.errors import Busy, ControlError
from tests.children import Children
from tests.clients.libnbd import nbdsh
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires("nbdsh")


def control(pool: ServedPool) -> ControlClient:
    return ControlClient(f"unix:{pool.directory / 'control.sock'}")


def uri(pool: ServedPool, info: LeaseInfo) -> str:
    assert info.export
    return pool.uri(info.export)


# The old holder writes over two connections all the time, until it is fenced; then the new holder
# looks. What it saw at first must stay, whatever the old one tries.
TAKEN_OVER = """
import subprocess

second = nbd.NBD()
second.connect_uri(OLD)
for connection in (h, second):
    connection.pwrite(b"a" * 4096, 0)
data = nbd.Buffer.from_bytearray(bytearray(b"b" * 4096))
for n in range(200):
    for connection in (h, second):
        connection.aio_pwrite(data, 4096 * (n % 64))
new_uri = subprocess.run(TAKE, shell=True, check=True, capture_output=True, text=True).stdout
new = nbd.NBD()
new.connect_uri(new_uri.strip())
seen = new.pread(64 * 4096, 0)
new.pwrite(b"c" * 4096, 0)
seen = b"c" * 4096 + seen[4096:]

for connection in (h, second):
    try:
        connection.pwrite(b"d" * 4096, 0)
    except nbd.Error as error:
        pass
    else:
        raise AssertionError("a fenced client wrote")
again = nbd.NBD()
for export_uri in (OLD, PLAIN):
    try:
        again.connect_uri(export_uri)
    except nbd.Error as error:
        pass
    else:
        raise AssertionError("a fenced client came back")
    again = nbd.NBD()
same(new.pread(64 * 4096, 0), seen)
new.flush()
"""


def test_a_fenced_client_s_writes_never_land(served: ServedPool, children: Children) -> None:
    info = control(served).acquire_lease("disk", "node-1")
    url = f"unix:{served.directory / 'control.sock'}"
    program = (
        "from nbdstore.control.client import ControlClient as C; import sys; "
        f"print({served.uri()!r}[:-4] + C({url!r}).acquire_lease('disk', 'node-2', force=True)"
        ".export)"
    )
    take = children.directory / "take.py"
    take.write_text(program)
    constants = {
        "OLD": uri(served, info),
        "PLAIN": served.uri(),
        "TAKE": f"{sys.executable} {take}",
    }
    head = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
    nbdsh(children, uri(served, info), head + TAKEN_OVER)
    log = served.log.read_text()
    assert "the volume was leased to 'node-2'" in log
    assert info.token and info.token not in log, "the log is no place for tokens"


def test_a_killed_server_keeps_lease_and_epoch(served: ServedPool, children: Children) -> None:
    control(served).acquire_lease("disk", "node-1")
    info = control(served).acquire_lease("disk", "node-2", force=True)
    nbdsh(children, uri(served, info), "h.pwrite(b'x' * 512, 0)")
    served.kill()
    served.restart()
    assert control(served).acquire_lease("disk", "node-2") == info
    nbdsh(children, uri(served, info), "same(h.pread(512, 0), b'x' * 512)")
    nbdsh(
        children,
        "",
        f"""
        for refused in ({served.uri()!r}, {served.uri("disk,lease=1-" + "0" * 32)!r}):
            try:
                nbd.NBD().connect_uri(refused)
            except nbd.Error as error:
                assert "policy" in str(error), error
            else:
                raise AssertionError("attached without the lease")
        """,
    )


@pytest.mark.requires("qemu-img")
def test_qemu_tells_who_holds_it(served: ServedPool, children: Children) -> None:
    """libnbd does not show what the server says, qemu does."""
    info = control(served).acquire_lease("disk", "node-1")
    command = ("qemu-img", "info", "--output=json")
    assert json.loads(children.run(*command, uri(served, info)))["virtual-size"] == 1 << 30
    said = children.run(*command, served.uri(), status=1)
    assert f"The export 'disk' is leased to 'node-1' since {info.since} (epoch 1)" in said


@pytest.mark.requires("nbdinfo")
def test_a_listing_has_what_can_be_attached(served: ServedPool, children: Children) -> None:
    served.create_volume("other", "1G")
    control(served).acquire_lease("disk", "node-1")
    said = children.run("nbdinfo", "--list", served.uri(""))
    assert 'export="other"' in said
    assert "disk" not in said


def test_connections_are_listed_and_ended(served: ServedPool, children: Children) -> None:
    info = control(served).acquire_lease("disk", "node-1")
    constants = {"URL": f"unix:{served.directory / 'control.sock'}", "PYTHON": sys.executable}
    head = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
    nbdsh(
        children,
        uri(served, info),
        head
        + """
import subprocess

def ask(expression):
    program = f"from nbdstore.control.client import ControlClient; c = ControlClient({URL!r}); "
    subprocess.run([PYTHON, "-c", program + expression], check=True)

other = nbd.NBD()
other.connect_uri(h.get_uri())
h.pwrite(b"x" * 65536, 0)
h.pread(4096, 0)
ask("a, b = c.attachments(); "
    "assert (a.export, a.holder, a.lease_epoch, a.in_flight) == ('disk', 'node-1', 1, 0), a; "
    "assert (a.bytes_written, a.bytes_read) == (65536, 4096), a; "
    "assert 0 < a.requests_per_s and 0 < a.read_per_s < a.written_per_s, a; "
    "assert (b.requests_per_s, b.written_per_s) == (0, 0), b; "
    "c.disconnect(a.id); c.disconnect(a.id); assert [i.id for i in c.attachments()] == [b.id]")
try:
    h.pwrite(b"y" * 512, 0)
except nbd.Error:
    pass
else:
    raise AssertionError("still connected")
same(other.pread(512, 0), b"x" * 512)
again = nbd.NBD()
again.connect_uri(h.get_uri())
same(again.pread(512, 0), b"x" * 512)
""",
    )


def test_a_clean_restart_keeps_it_too(served: ServedPool, children: Children) -> None:
    info = control(served).acquire_lease("disk", "node-1")
    served.stop()
    listing = json.loads(served.nbdstore("lease", "list", "--json"))
    assert [(item["holder"], item["epoch"]) for item in listing] == [("node-1", 1)]
    served.restart()
    nbdsh(children, uri(served, info), "h.pwrite(b'x' * 512, 0)")
    served.nbdstore("lease", "break", "disk")
    nbdsh(children, served.uri(), "same(h.pread(512, 0), b'x' * 512)")


@pytest.mark.parametrize("n_polls", [0, 3])
def test_kills_while_it_changes_hands(served: ServedPool, n_polls: int) -> None:
    """Whoever was told that it has the lease has it afterwards, and epochs never go back."""
    epoch = 0
    for n in range(3):
        told: list[LeaseInfo] = []

        def take(holder: str = f"node-{n}", told: list[LeaseInfo] = told) -> None:
            try:
                told.append(control(served).acquire_lease("disk", holder, force=True))
            except ControlError:
                pass  # it was killed first

        taker = threading.Thread(target=take)
        taker.start()
        for _ in range(n_polls):
            control(served).leases()
        served.kill()
        taker.join()
        served.restart()
        held = control(served).leases()
        if told:
            assert [(item.holder, item.epoch) for item in held] == [(f"node-{n}", told[0].epoch)]
        info = control(served).acquire_lease("disk", f"node-{n}", force=True)
        assert info.epoch > epoch
        if told:
            assert info == told[0]
        epoch = info.epoch


def test_of_many_takers_at_once_one_wins(served: ServedPool) -> None:
    results: list[object] = []

    def take(holder: str) -> None:
        try:
            results.append(control(served).acquire_lease("disk", holder))
        except Busy as error:
            results.append(error)

    takers = [threading.Thread(target=take, args=[f"node-{n}"]) for n in range(8)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    (winner,) = [result for result in results if isinstance(result, LeaseInfo)]
    losers = [result for result in results if isinstance(result, Busy)]
    assert len(losers) == 7
    assert all(f"leased to '{winner.holder}'" in str(loser) for loser in losers)
