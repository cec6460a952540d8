"""`kill -9` in the middle of writes: nothing that was acknowledged is lost, nothing is torn.

The oracle is the client. Each 4 KiB block that it writes says which block it is and which version
of it. The client counts what it has sent and what was acknowledged, kills the server while requests
are in flight, and after the restart each block must hold, as a whole, a version between the two.

fio keeps its own books: what it had got acknowledged when it pulled the trigger, it verifies later.
More kills, at all moments of a server's life, are in tests/kills.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.children import Children
from tests.clients.libnbd import nbdsh
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires("nbdsh", "fio")

N_ROUNDS = 4

# Compares every block with what the state file says was sent and acknowledged.
CHECK = """
import json, signal, struct

N_BLOCKS, MAX_RUN, N_IN_FLIGHT = 4096, 16, 32

with open(STATE) as file:
    sent, acknowledged = json.load(file)

def content(block, version):
    return struct.pack(">QQ", block, version) * 256

def check(block):
    found = h.pread(4096, block * 4096)
    number, version = struct.unpack(">QQ", found[:16])
    assert acknowledged[block] <= version <= sent[block], (
        f"block {block} has version {version}; acknowledged: {acknowledged[block]}, "
        f"sent: {sent[block]}")
    expected = content(block, version) if version else bytes(4096)
    assert found == expected, f"block {block} is torn or foreign"
    # An unacknowledged version is taken or not taken once and for all.
    sent[block] = acknowledged[block] = version

for block in range(N_BLOCKS):
    check(block)
"""

# Writes over two connections, kills the server while they are busy, and writes the state file.
LOAD = """
source = random.Random(SEED)
connections = [h, nbd.NBD()]
connections[1].connect_uri(URI)
# No more than one request in flight may touch a block, else their order is open.
busy, in_flight = set(), []

def send(connection):
    first = source.randrange(N_BLOCKS - MAX_RUN)
    blocks = range(first, first + source.randint(1, MAX_RUN))
    if busy.intersection(blocks):
        return
    busy.update(blocks)
    for block in blocks:
        sent[block] += 1
    data = b"".join(content(block, sent[block]) for block in blocks)
    buffer = nbd.Buffer.from_bytearray(bytearray(data))
    flags = nbd.CMD_FLAG_FUA if source.random() < 0.05 else 0
    cookie = connection.aio_pwrite(buffer, first * 4096, flags=flags)
    in_flight.append((connection, cookie, blocks))

def collect():
    for request in list(in_flight):
        connection, cookie, blocks = request
        if connection.aio_command_completed(cookie):
            in_flight.remove(request)
            busy.difference_update(blocks)
            for block in blocks:
                acknowledged[block] = sent[block]

n_batches = source.randint(50, 150)
for batch in range(n_batches):
    for connection in connections:
        while len(in_flight) < N_IN_FLIGHT:
            send(source.choice(connections))
        if source.random() < 0.1:
            connection.aio_flush()
        connection.poll(0 if batch % 3 else 10)
    collect()

os.kill(SERVER, signal.SIGKILL)
# What the server had acknowledged by then may still be on its way.
for connection in connections:
    try:
        while not (connection.aio_is_dead() or connection.aio_is_closed()):
            assert connection.poll(30000) != 0, "the killed server keeps its connections"
    except nbd.Error:
        pass
for request in list(in_flight):
    connection, cookie, blocks = request
    try:
        done = connection.aio_command_completed(cookie)
    except nbd.Error:
        done = False
    if done:
        for block in blocks:
            acknowledged[block] = sent[block]

with open(STATE, "w") as file:
    json.dump([sent, acknowledged], file)
assert sum(acknowledged) > 0
"""


@pytest.mark.parametrize("seed", range(2))
def test_acknowledged_writes_survive_kills(
    served: ServedPool, children: Children, seed: int
) -> None:
    state = children.directory / "state.json"
    state.write_text(json.dumps([[0] * 4096, [0] * 4096]))
    for round in range(N_ROUNDS):
        assert served.process
        constants = {
            "SEED": seed * N_ROUNDS + round,
            "SERVER": served.process.pid,
            "STATE": str(state),
            "URI": served.unix_uri(),
        }
        head = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
        nbdsh(children, served.uri(), head + CHECK + LOAD)
        served.kill()  # It is dead already: this collects its end.
        served.restart()
    nbdsh(children, served.uri(), f"STATE = {str(state)!r}\n" + CHECK)


FIO = (
    *("fio", "--name=killed", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16"),
    *("--numjobs=4", "--size=256M", "--offset_increment=256M", "--randseed=7"),
    *("--verify=crc32c", "--output-format=json"),
)


def test_fio_finds_all_it_got_acknowledged(
    served: ServedPool, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four jobs, each on its own connection and quarter of the volume."""
    monkeypatch.chdir(children.directory)  # where fio keeps its books
    assert served.process
    fio_jobs(
        children,
        *("--do_verify=0", "--verify_state_save=1", f"--uri={served.unix_uri()}"),
        *("--trigger-timeout=1s", f"--trigger=kill -9 {served.process.pid}"),
        status=None,
    )
    served.kill()
    served.restart()
    jobs = fio_jobs(
        children,
        *("--verify_only=1", "--verify_state_load=1", "--verify_fatal=1"),
        f"--uri={served.unix_uri()}",
        status=0,
    )
    assert [job["error"] for job in jobs] == [0] * 4
    for job in jobs:
        assert 0 < job["read"]["total_ios"] < 65536, "fio was killed neither too early nor too late"


def fio_jobs(children: Children, *options: str, status: int | None) -> Any:
    """Run fio and return its report on each job."""
    report = children.directory / "fio.json"
    children.run(*FIO, f"--output={report}", *options, status=status)
    text = report.read_text()
    return json.loads(text[text.index("{") :])["jobs"]
