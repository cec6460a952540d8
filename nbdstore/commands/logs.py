"""The log of daemons: one line per event on standard error, as a terminal or journald wants it."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Mapping

import click

from nbdstore.commands.output import note

LEVELS = ("debug", "info", "warning", "error")
level_option = click.option(
    "--log-level",
    type=click.Choice(LEVELS),
    default="info",
    show_default=True,
    help="What is logged: this, and what is worse.",
)
_PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
"""syslog(3) priorities, which journald reads from a prefix such as ``<4>`` (sd-daemon(3))."""


class OneLine(logging.Formatter):
    """Formats a record as one line; an exception shrinks to its type, message and place."""

    def formatException(self, ei: object) -> str:  # noqa: N802 - the name is logging's
        error = sys.exc_info()[1] if not isinstance(ei, tuple) else ei[1]
        if error is None:
            return ""
        frames = traceback.extract_tb(error.__traceback__)
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        return f"{type(error).__name__}: {error}{place}"

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", " | ")


class JournalLine(OneLine):
    """Formats for journald, which keeps time and process itself: a priority and the message."""

    def format(self, record: logging.LogRecord) -> str:
        return f"<{_PRIORITIES.get(record.levelname, 6)}>{super().format(record)}"


class Notes(logging.Handler):
    """Tells warnings to a person who runs one command; see `set_up_for_command`."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            note(record.getMessage())


def set_up_for_command() -> None:
    """Let a command tell what the store warns of, such as writes lost in a crash.

    Only warnings: an error is raised as well, and told once, at the end.
    """
    logging.getLogger("nbdstore").handlers[:] = [Notes()]


def set_up(level: str, environ: Mapping[str, str]) -> None:
    """Send the log of nbdstore to standard error; at level debug with tracebacks in full."""
    journal = to_journal(environ)
    layout = "%(message)s" if journal else "%(asctime)s %(levelname)-7s %(message)s"
    formatter: logging.Formatter
    if level == "debug":
        formatter = logging.Formatter(layout)
    else:
        formatter = JournalLine(layout) if journal else OneLine(layout)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    ours = logging.getLogger("nbdstore")
    ours.handlers.clear()
    ours.setLevel(level.upper())


def to_journal(environ: Mapping[str, str]) -> bool:
    """Return whether standard error is the stream that systemd connected to journald.

    JOURNAL_STREAM alone is not enough: children inherit it and may write elsewhere
    (systemd.exec(5)).
    """
    try:
        info = os.fstat(2)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"
