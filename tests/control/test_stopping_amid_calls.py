"""A control API that is told to stop does not wait for callers who do not read their answers."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from nbdstore.control import endpoint
from tests.control.real_pool import MIB, TIMEOUT_S, Served

SIZE = 16 * MIB
HASTE_S = 0.01
LOOK_TURNS = 100


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Served]:
    """A pool with ``db@a`` of random bytes, whose API waits for calls longer than a test does."""
    with mock.patch.object(endpoint, "STOP_TIMEOUT_S", 10 * TIMEOUT_S):
        served = Served(tmp_path)
    served.fill(SIZE)
    yield served
    served.close()


def wait_until_nothing_moves(served: Served) -> None:
    """Wait until as much waits to be read for many turns of the loop, and not nothing."""

    async def look() -> None:
        (entrance,) = served.endpoint._entrances
        n_waiting, n_turns = 0, 0
        while n_turns < LOOK_TURNS:
            await asyncio.sleep(0)
            streams = [c.transport for c in entrance.server.connections if c.transport is not None]
            found = sum(stream.get_write_buffer_size() for stream in streams)
            n_turns = n_turns + 1 if found and found == n_waiting else 0
            n_waiting = found

    served.run(look())


@pytest.mark.parametrize("path", ["/v1/volumes/db/data", "/v1/snapshots/db@a/stream"])
def test_a_reader_that_has_stopped_is_cut_off(patient: Served, path: str) -> None:
    connection = patient.connect()
    connection.request("GET", path)
    response = connection.getresponse()
    wait_until_nothing_moves(patient)
    with mock.patch.object(endpoint, "UNREAD_TIMEOUT_S", HASTE_S):
        patient.run(patient.endpoint.stop())
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        response.read()
    connection.close()


def test_a_reader_that_reads_gets_all_of_it(patient: Served) -> None:
    connection = patient.connect()
    connection.request("GET", "/v1/volumes/db/data")
    response = connection.getresponse()
    wait_until_nothing_moves(patient)
    with mock.patch.object(endpoint, "UNREAD_TIMEOUT_S", 10 * TIMEOUT_S):
        stopping = asyncio.run_coroutine_threadsafe(patient.endpoint.stop(), patient.loop)
        assert len(response.read()) >= SIZE
        stopping.result(TIMEOUT_S)
    connection.close()
