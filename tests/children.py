"""The programs that one test starts. None outlives the test, even if pytest itself is killed.

Owns starting, logging and killing; knows nothing of what the programs are.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.closing import Closing

# The kernel kills the child when the thread that started it dies.
DIE_WITH_PARENT = ("/usr/bin/setpriv", "--pdeathsig", "KILL", "--")
# A program that does not die from SIGKILL hangs in the kernel: do not wait for it for ever.
KILL_TIMEOUT_S = 30.0

Argument = str | os.PathLike[str]


class CommandError(AssertionError):
    """A program that a test runs ended with another status than the test expects."""

    def __init__(self, argv: Sequence[str], status: int, output: str) -> None:
        self.status = status
        self.output = output
        super().__init__(f"{shlex.join(argv)}\nended with status {status}:\n{output}")


class Children(Closing):
    """A group of child processes, killed together.

    ``logs`` are the files that the children write; they are worth reading when a test fails.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.logs: list[Path] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(
        self,
        *argv: Argument,
        timeout_s: float = 60,
        status: int | None = 0,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
    ) -> str:
        """Run a program to its end and return what it wrote, standard output and error together.

        Raises CommandError unless it ends with ``status``; None accepts every status.
        """
        __tracebackhide__ = True
        words = [os.fspath(word) for word in argv]
        done = subprocess.run(
            [*DIE_WITH_PARENT, *words],
            check=False,
            input=stdin.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            env={**os.environ, **(env or {})},
        )
        output = done.stdout.decode(errors="replace")
        if status is not None and done.returncode != status:
            raise CommandError(words, done.returncode, output)
        return output

    def start(
        self,
        *argv: Argument,
        log: str,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a program that runs beside the test; its output is appended to the file ``log``."""
        path = self.log_file(log)
        with path.open("ab") as file:
            process = subprocess.Popen(
                [*DIE_WITH_PARENT, *argv],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **(env or {})},
                pass_fds=pass_fds,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def log_file(self, name: str) -> Path:
        """Name a file of this group's directory that is shown when the test fails."""
        path = self.directory / name
        path.touch()
        if path not in self.logs:
            self.logs.append(path)
        return path

    def close(self) -> None:
        """Kill all that still run, and what they have started, the youngest first."""
        for process in reversed(self.processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in reversed(self.processes):
            process.wait(KILL_TIMEOUT_S)
        self.processes.clear()
