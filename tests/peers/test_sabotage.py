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
from tests.figures import Tell
from tests.peers.inside import memory_pool, served
from tests.peers.running import outcomes
from tests.peers.sabotage import SABOTAGES, Sabotage

SETTINGS = Settings(timeout_s=4)
"""Short, since a server that hangs makes the client wait for all of it."""


def outcome_of(sabotage: Sabotage, directory: Path) -> Outcome:
    """Run the case that must find it against nbdstore as it is now."""
    options, tls = {}, sabotage.tls
    authority = Authority(directory / "authority")
    if tls is not TlsMode.OFF:
        files = authority.issue_server()
        options["tls"] = TlsOptions(tls, files.certificate, files.key)
    scheme = "nbd" if tls is TlsMode.OFF else "nbds"
    with served(memory_pool(), directory, **options) as path:
        (result,) = outcomes(
            f"{scheme}+unix:///disk?socket={path}",
            [TABLE[sabotage.found_by]],
            settings=SETTINGS,
            modes=sabotage.modes,
            tls_files=TlsFiles(ca=authority.certificate),
        )
    return result.outcome


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=[s.name for s in SABOTAGES])
def test_a_broken_server_is_found_out(
    sabotage: Sabotage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Tell
) -> None:
    sabotage.apply(monkeypatch)
    assert outcome_of(sabotage, tmp_path) in (Outcome.FAIL, Outcome.DIFFERS)
    tell("conformance", {"broken servers found out": 1})


def test_every_rule_is_broken_once_and_found_by_a_case_about_it() -> None:
    assert {sabotage.rule for sabotage in SABOTAGES} == set(RULES)
    hang = {"read"}
    strangers = [
        s.name
        for s in SABOTAGES
        if s.rule not in TABLE[s.found_by].rules and s.found_by not in hang
    ]
    assert strangers == []
