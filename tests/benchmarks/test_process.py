"""What a process costs is read from /proc, with what its children cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import page_cache, process

# Works for 0.2 s of CPU in a child, waits for it, and holds 64 MiB.
PARENT = """
import os, sys, time
def work():
    while time.process_time() < 0.2:
        pass
if (child := os.fork()) == 0:
    work()
    os._exit(0)
os.waitpid(child, 0)
memory = bytearray(b"x" * (64 << 20))
if os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
print("ready", flush=True)
sys.stdin.read()
os.wait()
"""


def test_children_count_while_they_live_and_afterwards() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"ready\n"
        assert len(process.tree(parent.pid)) == 2
        assert process.tree(parent.pid)[-1] == parent.pid
        assert process.cpu_s(parent.pid) >= 0.19
        # The 64 MiB are shared with the child: counted once, not twice.
        assert 64 <= process.memory_bytes(parent.pid) >> 20 < 110
        parent.communicate(b"")


def test_a_process_that_is_gone_costs_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait()
    assert process.cpu_s(gone.pid) == 0
    assert process.memory_bytes(gone.pid) == 0


def test_files_are_what_they_were_after_they_left_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"content" * 1000)
    page_cache.sync([path])
    page_cache.drop([path])
    assert path.read_bytes() == b"content" * 1000
