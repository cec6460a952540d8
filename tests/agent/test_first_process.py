"""A container's first process, in a namespace of its own: orphans, signals, the end."""

from __future__ import annotations

import os
import sys

import pytest

from nbdstore.agent import first_process
from tests.children import Children

pytestmark = [pytest.mark.requires("root", "unshare", "setsid"), pytest.mark.timeout(60)]

HEAD = """
import glob, os, signal, subprocess
from nbdstore.agent.first_process import split_if_first
split_if_first()
"""
ORPHANS = """
for _ in range(3):
    subprocess.run(["setsid", "--fork", "sh", "-c", "exit 3"], check=True)
    assert subprocess.run(["sh", "-c", "exit 5"]).returncode == 5, "this one is our own"
def states():
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            yield open(path).read().rpartition(") ")[2][0]
        except (FileNotFoundError, ProcessLookupError):
            pass
while sum(1 for _ in states()) > 2 or "Z" in states():
    pass
assert os.getppid() == 1
os._exit(7)
"""
SIGNALS = """
stops = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, stops)
for sent, comes in (
    (signal.SIGTERM, signal.SIGTERM),
    (signal.SIGINT, signal.SIGINT),
    (signal.SIGHUP, signal.SIGTERM),
    (signal.SIGQUIT, signal.SIGTERM),
):
    os.kill(1, sent)
    assert signal.sigwait(stops) == comes
os.kill(os.getpid(), signal.SIGKILL)
"""


def run_first(children: Children, script: str, status: int) -> None:
    namespace = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    children.run(*namespace, sys.executable, "-c", HEAD + script, status=status)


def test_orphans_are_reaped_and_the_agents_own_programs_are_not(children: Children) -> None:
    run_first(children, ORPHANS, 7)


def test_signals_are_handed_on_and_the_end_is_the_agents(children: Children) -> None:
    run_first(children, SIGNALS, 128 + 9)


def test_where_there_is_another_first_process_nothing_is_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 2)
    monkeypatch.setattr(os, "fork", None)
    first_process.split_if_first()
