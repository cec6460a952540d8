"""A broken server is found out: for every rule there is a server that breaks it, and fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdstore.server import TlsMode, TlsOptions
from tests.clients.certificates import Authority
from tests.conformance.case import RULES, TABLE
from tests.conformance.outcome import Outcome
from tests.conformance.server import Settings
from tests.conformance.target import TlsFiles
from tests.peers.inside import memory_pool, served
from tests.peers.running import outcomes
from tests.peers.sabotage import SABOTAGES, Sabotage

SETTINGS = Settings(timeout_s=1.5)
"""Short, since a server that hangs makes the client wait for all of it."""


def outcome_of(case_id: str, tls: TlsMode, directory: Path) -> Outcome:
    """Run one case against nbdstore as it is now."""
    options = {}
    authority = Authority(directory / "authority")
    if tls is not TlsMode.OFF:
        files = authority.issue_server()
        options["tls"] = TlsOptions(tls, files.certificate, files.key)
    scheme = "nbd" if tls is TlsMode.OFF else "nbds"
    with served(memory_pool(), directory, **options) as path:
        (result,) = outcomes(
            f"{scheme}+unix:///disk?socket={path}",
            [TABLE[case_id]],
            settings=SETTINGS,
            tls_files=TlsFiles(ca=authority.certificate),
        )
    return result.outcome


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=[s.name for s in SABOTAGES])
def test_a_broken_server_is_found_out(
    sabotage: Sabotage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage.apply(monkeypatch)
    found = outcome_of(sabotage.found_by, sabotage.tls, tmp_path)
    assert found in (Outcome.FAIL, Outcome.DIFFERS)


def test_every_rule_is_broken_once_and_found_by_a_case_about_it() -> None:
    assert {sabotage.rule for sabotage in SABOTAGES} == set(RULES)
    hang = {"read"}
    strangers = [
        s.name
        for s in SABOTAGES
        if s.rule not in TABLE[s.found_by].rules and s.found_by not in hang
    ]
    assert strangers == []
