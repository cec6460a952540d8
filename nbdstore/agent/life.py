"""The life of an agent's process: from its start to a clean stop.

    hold the state directory -> answer on the socket -> READY=1 -> tend what the records wish
    ... SIGTERM or SIGINT ...
    STOPPING=1 -> no new questions -> unmount and detach what is not in use, unless told to keep it

A kill at any moment does no harm: the kernel (or the relays) carry on, and the next agent takes
over what it finds.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nbdstore import systemd
from nbdstore.agent.api import AgentServer
from nbdstore.agent.local import LocalAgent, Setting, open_agent
from nbdstore.agent.requests import MountRequest
from nbdstore.agent.watch import Watch

LOCK_PATIENCE_S = 30.0
"""A command that acts in the place of an agent is done by then; another agent is not."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)


def run(
    setting: Setting,
    socket_path: Path,
    *,
    wanted: Sequence[MountRequest] = (),
    keep: bool = False,
    environ: Mapping[str, str],
    announce: Callable[[LocalAgent], None],
) -> None:
    """Be an agent until a signal.

    Arguments:
        wanted: to be mounted as soon as that can be done, and as long as the agent runs.
        keep: leave everything attached and mounted at the end.
        environ: for the service manager's variables.
        announce: called when questions are answered.

    Raises:
        NbdstoreError: the start failed.
    """
    # Before there are threads, which inherit it: the signals are waited for here and nowhere else.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with open_agent(setting, patience_s=LOCK_PATIENCE_S) as agent:
        server = AgentServer(agent, socket_path)
        watch = Watch(agent, wanted)
        server.start()
        watch.start()
        systemd.notify(environ, "READY=1")
        announce(agent)
        received = signal.sigwait(STOP_SIGNALS)
        log.info("%s: stopping", signal.Signals(received).name)
        systemd.notify(environ, "STOPPING=1")
        server.stop()
        watch.stop()
        if not keep:
            agent.stop()
