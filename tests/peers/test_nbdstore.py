"""nbdstore under the conformance client: every case passes, in one configuration at least."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstore.errors import Corruption
from nbdstore.server import Limits
from tests.children import Children
from tests.clients.certificates import Authority
from tests.clients.served_pool import ServedPool
from tests.conformance.cases import all_cases
from tests.conformance.outcome import Outcome
from tests.conformance.server import Settings
from tests.conformance.target import TlsFiles
from tests.figures import Tell
from tests.peers.inside import memory_pool, served
from tests.peers.running import explain, outcomes, skipped
from tests.server.memory_pool import BLOCK

SLOW = {case.id for case in all_cases() if case.slow}
ABOUT_TLS = {case.id for case in all_cases() if case.phase == "tls"}
ABOUT_READ_ONLY = {"read-only", "read-only-refuses"}
NEVER = {"fua-unoffered": "SEND_FUA is always offered", "zero-fast-unoffered": "so is FAST_ZERO"}
"""Cases about what nbdstore does not do; test_sabotage shows that they work."""

HARMLESS = {"unoffered", "write-4g", "extended-write-huge"}
NEED_WRITING = {case.id for case in all_cases() if case.writes} - ABOUT_READ_ONLY - HARMLESS

SKIPPED = {
    "plain": (ABOUT_TLS - {"tls-off", "tls-data"}) | ABOUT_READ_ONLY | {"read-unreadable"},
    "tls required": {"tls-off", "tls-optional", "read-unreadable"} | ABOUT_READ_ONLY,
    "tls optional": {"tls-off", "tls-required", "tls-required-export-name", "read-unreadable"}
    | ABOUT_READ_ONLY,
    "read-only": (ABOUT_TLS - {"tls-off", "tls-data"}) | NEED_WRITING | {"read-unreadable"},
}
"""What each configuration cannot show; beside NEVER."""


@pytest.fixture
def pool(children: Children, tmp_path: Path) -> Iterator[ServedPool]:
    """A pool with two volumes, one of them above 4 GiB; checked when the test ends."""
    pool = ServedPool(children, tmp_path)
    pool.create("--capacity", "8G", "--journal-size", "16M")
    pool.create_volume("disk", "8G")
    pool.create_volume("other", "64M")
    yield pool
    pool.close()


def tls_arguments(mode: str, authority: Authority) -> list[str]:
    files = authority.issue_server()
    paths = ["--tls-cert", str(files.certificate), "--tls-key", str(files.key)]
    return ["--tls", mode, *paths]


@pytest.mark.parametrize("configuration", SKIPPED)
def test_every_case_passes(
    pool: ServedPool, tmp_path: Path, tell: Tell, configuration: str
) -> None:
    authority = Authority(tmp_path / "authority")
    tls = configuration.startswith("tls")
    if tls:
        pool.start(*tls_arguments(configuration.partition(" ")[2], authority))
    else:
        pool.start(*(["--read-only"] if configuration == "read-only" else []))
    uri = pool.uri(tls=True) if tls else pool.unix_uri()
    results = outcomes(uri, tls_files=TlsFiles(ca=authority.certificate))
    assert explain(results, {}) == ""
    assert skipped(results) == SKIPPED[configuration] | NEVER.keys()
    passed = sum(result.outcome is Outcome.PASS for result in results)
    tell("conformance", {"cases passed": passed, "configurations": 1})


def test_no_case_is_left_out_everywhere() -> None:
    everywhere = set.intersection(*SKIPPED.values())
    assert everywhere == {"read-unreadable"}, "and that has a test of its own"


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    pool = memory_pool()
    damaged = range(20 * BLOCK, 24 * BLOCK)
    read = pool.volumes["disk"]._read

    def read_with_damage(offset: int, length: int) -> list[memoryview | int]:
        if offset < damaged.stop and damaged.start < offset + length:
            raise Corruption("slot 7", "aa", "bb")
        return read(offset, length)

    pool.volumes["disk"]._read = read_with_damage  # type: ignore[method-assign]
    cases = [case for case in all_cases() if case.id == "read-unreadable"]
    settings = Settings(unreadable=(damaged.start, len(damaged)))
    with served(pool, tmp_path) as path:
        (result,) = outcomes(f"nbd+unix:///disk?socket={path}", cases, settings=settings)
    assert result.outcome is Outcome.PASS, result.detail


def test_slow_cases_pass(tmp_path: Path) -> None:
    """nbdstore's deadline for a handshake is 10 s; here it is shorter."""
    cases = [case for case in all_cases() if case.slow]
    limits = Limits(handshake_timeout_s=0.3, linger_s=0.1)
    with served(memory_pool(), tmp_path, limits=limits) as path:
        results = outcomes(f"nbd+unix:///disk?socket={path}", cases)
    assert explain(results, {}) == ""
    assert skipped(results) == set()
