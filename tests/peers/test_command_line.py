"""The command line: what it prints, how it ends, and that it writes nothing unasked."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.children import Children
from tests.conformance.cases import all_cases
from tests.conformance.target import BadTarget, parse_uri
from tests.peers.inside import memory_pool, served
from tests.peers.readme import PACKAGE
from tests.server.memory_pool import MemoryPool, MemoryVolume

ROOT = Path(__file__).parents[2]

ALONE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from tests.conformance.__main__ import main
sys.exit(main())
"""
"""Run the client out of another folder, by an interpreter that looks at nothing else (-I)."""


@pytest.fixture
def pool() -> MemoryPool:
    return memory_pool()


@pytest.fixture
def uri(pool: MemoryPool, tmp_path: Path) -> Iterator[str]:
    with served(pool, tmp_path) as path:
        yield f"nbd+unix:///disk?socket={path}"


def conformance(children: Children, *arguments: str | Path, status: int = 0) -> str:
    return children.run(
        *(sys.executable, "-m", "tests.conformance", *arguments),
        status=status,
        env={"PYTHONPATH": str(ROOT)},
    )


def test_the_list_has_every_case(children: Children) -> None:
    listed = conformance(children, "--list", "--slow")
    assert [case.id for case in all_cases() if f"{case.id} " not in listed] == []


def test_the_folder_works_by_itself(children: Children, tmp_path: Path, uri: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "alone" / "tests" / "conformance")
    output = children.run(
        *(sys.executable, "-I", "-c", ALONE, tmp_path / "alone", uri, "--only", "hello", "read")
    )
    assert "2 pass, 0 fail" in output


def test_nothing_is_written_unasked(children: Children, pool: MemoryPool, uri: str) -> None:
    volume = pool.volumes["disk"]
    volume._write(4096, b"precious")
    output = conformance(children, uri)
    assert "0 fail, 0 differs" in output
    assert "--destructive" in output
    assert volume.blocks.keys() == {1}
    assert volume.n_written_now == 0
    assert changes(volume) == []


def changes(volume: MemoryVolume) -> list[str]:
    return [call for call in volume.calls if call.startswith(("write", "trim"))]


def test_destructive_writes(children: Children, pool: MemoryPool, uri: str) -> None:
    conformance(children, "--destructive", uri, "--only", "write", "fua")
    assert changes(pool.volumes["disk"])


def test_results_for_programs(children: Children, uri: str) -> None:
    document = json.loads(conformance(children, "--json", uri, "--only", "hello", "tls-twice"))
    assert [(r["id"], r["outcome"]) for r in document["results"]] == [
        ("hello", "pass"),
        ("tls-twice", "skipped"),
    ]
    assert document["replies"] == ["simple", "structured", "extended"]


def test_a_failure_is_told_and_ends_with_1(
    children: Children, pool: MemoryPool, uri: str, tmp_path: Path
) -> None:
    pool.volumes["disk"].error = OSError("a bug")
    output = conformance(children, uri, "--only", "read", status=1)
    assert "fail     read " in output
    assert 'proto.md, "NBD_CMD_READ"' in output


def test_what_is_expected_is_no_failure(
    children: Children, pool: MemoryPool, uri: str, tmp_path: Path
) -> None:
    pool.volumes["disk"].error = OSError("a bug")
    known = tmp_path / "known.txt"
    known.write_text("# of a broken disk\nfail read it has a bug\n")
    conformance(children, uri, "--expect", known, "--only", "read")
    pool.volumes["disk"].error = None
    output = conformance(children, uri, "--expect", known, "--only", "read", status=1)
    assert "read: pass, expected fail" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which server?"),
        (["http://localhost/"], "no NBD URI"),
        (["nbd+unix:///disk"], "socket=PATH"),
        (["nbd://localhost:99999/"], "Port out of range"),
        (["nbd+unix:///x?socket=/nonexistent/socket"], "No such file or directory"),
        (["nbd://localhost/x", "--only", "nothing"], "no case or phase 'nothing'"),
        (["nbds://localhost/x", "--tls-ca", "/nonexistent"], "cannot use the TLS files"),
    ],
)
def test_what_makes_no_sense_ends_with_2(
    children: Children, arguments: list[str], message: str
) -> None:
    assert message in conformance(children, *arguments, status=2)


def test_an_export_that_does_not_exist_ends_with_2(children: Children, uri: str) -> None:
    output = conformance(children, uri.replace("/disk", "/none"), status=2)
    assert "INFO 'none' is answered ERR_UNKNOWN" in output


@pytest.mark.parametrize(
    ("uri", "address", "export", "tls"),
    [
        ("nbd://host", ("host", 10809), "", False),
        ("nbd://[::1]:7/a%20b", ("::1", 7), "a b", False),
        ("nbds://host:8/x/y", ("host", 8), "x/y", True),
        ("nbd+unix:///x?socket=/run/a", "/run/a", "x", False),
        ("nbds+unix:///?socket=/run/a%3Fb", "/run/a?b", "", True),
    ],
)
def test_uris(uri: str, address: object, export: str, tls: bool) -> None:
    target = parse_uri(uri)
    assert (target.address, target.export, target.tls) == (address, export, tls)


def test_uris_of_others_are_refused() -> None:
    with pytest.raises(BadTarget):
        parse_uri("nbd+vsock:///x")
