"""Running the system's programs (mkfs, mount, losetup ...): one way, with errors a person can use.

Knows nothing of what the programs do. A program gets no terminal, so none can ask a question.
"""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Sequence
from typing import IO, NamedTuple

from nbdstore.errors import DeviceError

TIMEOUT_S = 120.0
SBIN = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
"""Programs for the administrator lie outside of many a user's PATH."""
MAX_SHOWN = 400


class Done(NamedTuple):
    """A program that ended. output: standard output and error together."""

    status: int
    output: str


class ProgramTimeout(DeviceError):
    """A program did not end in time; it was killed, or hangs in the kernel until its I/O ends."""


def run(
    *argv: str, accept: Collection[int] = (0,), timeout_s: float = TIMEOUT_S, stdin: bytes = b""
) -> Done:
    """Run a program to its end.

    Raises:
        DeviceError: it is not installed, or ended with a status that is not in `accept`.
        ProgramTimeout: it did not end within `timeout_s`.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": SBIN, "LC_ALL": "C.UTF-8"},
        )
    except FileNotFoundError:
        raise DeviceError(f"the program {argv[0]} is not installed on this machine") from None
    except OSError as error:
        raise DeviceError(f"{argv[0]} cannot be started: {error.strerror}") from error
    try:
        output, _ = process.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # One that waits for I/O dies when that ends, and not before: do not wait for it.
        process.kill()
        raise ProgramTimeout(f"'{_shown(argv)}' did not end within {timeout_s:g} s") from None
    done = Done(process.returncode, output.decode(errors="replace").strip())
    if done.status not in accept:
        said = " ".join(done.output.split())[-MAX_SHOWN:]
        raise DeviceError(f"'{_shown(argv)}' ended with status {done.status}: {said}")
    return done


def _shown(argv: Sequence[str]) -> str:
    return " ".join(argv)


def start_detached(*argv: str, output: IO[bytes]) -> None:
    """Start a program that outlives this one: in a session of its own, and not as our child."""
    done = subprocess.run(
        ["setsid", "--fork", *argv],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd="/",
    )
    if done.returncode:
        raise DeviceError(f"'{argv[0]}' cannot be started (setsid: status {done.returncode})")
