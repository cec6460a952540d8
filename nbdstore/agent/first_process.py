"""What a container's first process owes to the others there: it reaps those that nobody else does.

A process whose parent has ended becomes the first process's child, and stays in the table of
processes until that takes its exit status. The relays of the fuse driver are nobody's children from
their start, so that they outlive an agent; so is nbdfuse, when its relay is killed.

    pid 1             hands on signals, takes the exit status of every child; ends with the agent
    └─ the agent      waits for the programs that it runs, and for none that it did not start

Why two processes: one that waited for any child would take the exit statuses of the agent's own
programs from under those who wait for them. Why no PR_SET_CHILD_SUBREAPER: where the agent is not
the first process, that one reaps, be it systemd or a container's init.
"""

from __future__ import annotations

import os
import signal
from typing import Final

HANDED_ON: Final = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGQUIT: signal.SIGTERM,
}
"""A terminal that closes, or an image's STOPSIGNAL, asks for a clean stop, too, as which the agent
knows two signals; the others would end it in the middle of whatever it does."""


def split_if_first() -> None:
    """Become the child of a first process that reaps, if this is a container's first process.

    Returns in the child alone. To be called before there are threads.
    """
    if os.getpid() != 1:
        return
    # Blocked from before there is a child, none that comes is lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*HANDED_ON, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os._exit(_serve(child))


def _serve(child: int) -> int:
    """Be the first process until `child` ends; return its exit status as a shell would."""
    while True:
        received = signal.sigwait({*HANDED_ON, signal.SIGCHLD})
        if received != signal.SIGCHLD:
            os.kill(child, HANDED_ON[signal.Signals(received)])
            continue
        # Several that have ended may share one signal.
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
                return code if code >= 0 else 128 - code
