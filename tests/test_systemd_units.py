"""The units of packaging/systemd: systemd understands them, and they run what there is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.clients.served_pool import NBDSTORE

UNITS = sorted((Path(__file__).parents[1] / "packaging" / "systemd").glob("*.service"))
PROGRAM = "/usr/local/bin/nbdstore"


@pytest.mark.requires("systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_understands_the_unit(unit: Path, tmp_path: Path) -> None:
    # All of them: they name each other.
    for other in UNITS:
        text = other.read_text().replace(PROGRAM, str(NBDSTORE))
        (tmp_path / other.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", tmp_path / unit.name],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_runs_a_command_that_there_is(unit: Path) -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.M)
    program, *words = [word for word in line.split() if not word.startswith("$")]
    assert program == PROGRAM
    done = subprocess.run([NBDSTORE, *words, "--help"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_the_agent_has_rights_and_it_has_no_mounts_of_its_own() -> None:
    """What would give it mounts of its own would keep what it mounts from Docker."""
    for unit in UNITS:
        text = unit.read_text()
        is_agent = unit.stem == "nbdstore-agent"
        assert ("CapabilityBoundingSet=\n" in text) is not is_agent
        private = re.findall(r"^(Private\w+|Protect\w+|ReadOnlyPaths|\w*BindPaths)=", text, re.M)
        assert bool(private) is not is_agent
        assert ("KillMode=process\n" in text) is is_agent


def test_the_agent_may_do_what_it_does_and_no_more() -> None:
    """Without CAP_SYS_PTRACE, /proc hides from it that others have a device open."""
    (unit,) = (unit for unit in UNITS if unit.stem == "nbdstore-agent")
    lists = re.findall(r"^CapabilityBoundingSet=(.*)$", unit.read_text(), re.M)
    assert {right for line in lists for right in line.split()} == {
        *("CAP_SYS_ADMIN", "CAP_SYS_MODULE", "CAP_MKNOD", "CAP_SYS_RESOURCE", "CAP_SYS_PTRACE"),
        *("CAP_CHOWN", "CAP_FOWNER", "CAP_DAC_OVERRIDE", "CAP_FSETID"),
    }


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_waits_before_it_starts_again(unit: Path) -> None:
    """At the default of 0.1 s, five failures in half a second would end it for good."""
    assert "\nRestart=on-failure\nRestartSec=2\n" in unit.read_text()


def test_what_uses_the_network_starts_when_it_is_there() -> None:
    for unit in UNITS:
        if unit.stem != "nbdstore-docker-plugin":  # it follows the agent
            text = unit.read_text()
            assert re.search(r"^Wants=.*\bnetwork-online\.target\b", text, re.M)
            assert re.search(r"^After=.*\bnetwork-online\.target\b", text, re.M)
