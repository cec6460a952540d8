"""The command line: the global options, the list of commands, and what a failure looks like.

The only reader of argv and environment. Exit status: 0 done, 1 failed, 2 wrong usage, and death by
the signal after Ctrl-C or when nobody reads standard output, as shells expect. A failure is one
line on standard error that says what was wrong and what to do; a bug of nbdstore too, with the
traceback behind --debug.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from nbdstore import __version__
from nbdstore.commands import completion, logs
from nbdstore.commands.groups import LazyGroup
from nbdstore.commands.session import Session
from nbdstore.errors import NbdstoreError

SYSTEM_POOL = Path("/var/lib/nbdstore")
GLOBAL_OPTIONS = ("--pool", "--server", "--token-file", "--tls-ca", "--debug")
COMMANDS = {
    "pool": "pool.pool",
    "volume": "volume.volume",
    "snapshot": "snapshot.snapshot",
    "clone": "snapshot.clone",
    "flatten": "snapshot.flatten",
    "trash": "trash.trash",
    "serve": "serve.serve",
    "ps": "connections.ps",
    "disconnect": "connections.disconnect",
    "lease": "lease.lease",
    "agent": "agent.agent",
    "attach": "agent.attach",
    "detach": "agent.detach",
    "mount": "agent.mount",
    "umount": "agent.umount",
    "doctor": "agent.doctor",
    "import": "transfer.import_",
    "export": "transfer.export_",
    "diff": "diff.diff",
    "send": "backup.send",
    "receive": "backup.receive",
    "stream": "backup.stream",
    "capacity": "capacity.capacity",
    "du": "du.du",
    "scrub": "scrub.scrub",
    "operation": "operation.operation",
    "events": "operation.events",
    "app": "app.app",
    "docker-plugin": "docker_plugin.docker_plugin",
    "check": "check.check",
    "salvage": "salvage.salvage",
    "completion": "completion.completion",
}
"""Where each command is, in `nbdstore.commands`; the help lists them in this order."""


class _Bug(Exception):
    """An exception that nobody foresaw, on its way to the one line that a person sees."""


class _Died(Exception):
    """The command was ended by a signal, or by what a signal stands for."""

    def __init__(self, signal_number: signal.Signals) -> None:
        self.signal = signal_number


class CommandLine(LazyGroup):
    """The root group, and what becomes of failures."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line and exit; see the module for the exit status."""
        kwargs |= {"standalone_mode": False, "complete_var": completion.VARIABLE}
        try:
            # --help and --version end here with their status as the result.
            sys.exit(super().main(*args, **kwargs) or 0)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except click.UsageError as error:
            _fail(_usage_text(error), 2)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except click.Abort:
            _die(signal.SIGINT)
        except _Died as error:
            _die(error.signal)
        except NbdstoreError as error:
            _fail(str(error), error.exit_status)
        except _Bug as error:
            _fail(f"bug: {error}; --debug before the command shows where", 1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, telling apart what it raises before click sees it."""
        try:
            super().invoke(ctx)
            if sys.stdout is not None:  # it is None when it was closed from the start (>&-)
                sys.stdout.flush()
        except KeyboardInterrupt:
            raise _Died(signal.SIGINT) from None
        except BrokenPipeError:
            raise _Died(signal.SIGPIPE) from None
        except (NbdstoreError, click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            if isinstance(error, ImportError) and not (error.name or "").startswith("nbdstore"):
                raise NbdstoreError(
                    f"a package that nbdstore needs cannot be loaded: {error}: install nbdstore "
                    "again, with what it requires"
                ) from error
            raise _Bug(f"{type(error).__name__}: {error}") from error


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"nbdstore: {' '.join(message.split())}", err=True)
    sys.exit(status)


def _usage_text(error: click.UsageError) -> str:
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption) and error.option_name in GLOBAL_OPTIONS:
        return f"{error.option_name} goes before the command: nbdstore {error.option_name} ..."
    command = error.ctx.command_path if error.ctx else "nbdstore"
    return f"{message[:1].lower()}{message[1:]} (see '{command} --help')"


def _die(signal_number: signal.Signals) -> NoReturn:
    """End the process by the signal itself, so that a shell's loop ends with it."""
    # What is still buffered cannot be written any more; Python must not try at its exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal_number, signal.SIG_DFL)
    os.kill(os.getpid(), signal_number)
    sys.exit(128 + signal_number)


def _default_pool() -> Path:
    if os.geteuid() == 0:
        return SYSTEM_POOL
    try:
        return Path.home() / ".local/share/nbdstore"
    except RuntimeError:  # a user without an entry in passwd(5) and $HOME, as in some containers
        raise click.UsageError("nobody knows your home directory: say where with --pool") from None


@click.group(
    "nbdstore",
    cls=CommandLine,
    places={name: f"nbdstore.commands.{place}" for name, place in COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--pool",
    type=click.Path(path_type=Path, readable=False),
    metavar="DIR",
    envvar="NBDSTORE_POOL",
    show_envvar=True,
    default=_default_pool,
    show_default="/var/lib/nbdstore for root, else ~/.local/share/nbdstore",
    help="The pool's directory.",
)
@click.option(
    "--server",
    metavar="URL",
    envvar=["NBDSTORE_SERVER", "BLOCK_STORAGE"],
    show_envvar=True,
    help="A server elsewhere: https://HOST:PORT, http://HOST:PORT or unix:PATH. Wins over --pool.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    envvar="NBDSTORE_TOKEN_FILE",
    show_envvar=True,
    help="Holds the token that --server wants.",
)
@click.option(
    "--tls-ca",
    type=click.Path(path_type=Path),
    metavar="FILE",
    envvar="NBDSTORE_TLS_CA",
    show_envvar=True,
    help="Who signs the certificate of an https --server, PEM.",
)
@click.option("--debug", is_flag=True, help="Show a traceback when something goes wrong.")
@click.version_option(__version__, prog_name="nbdstore", message="%(prog)s %(version)s")
@click.pass_context
def cli(
    ctx: click.Context,
    pool: Path,
    server: str | None,
    token_file: Path | None,
    tls_ca: Path | None,
    debug: bool,
) -> None:
    """Thin-provisioned block volumes, served over NBD.

    A pool is a directory that holds blocks; a volume is a thin disk in it; the server exports every
    volume under its name to whatever speaks NBD: the Linux kernel, QEMU, libnbd.

    \b
    First steps:
      nbdstore pool create
      nbdstore volume create db --size 10G
      nbdstore serve
      nbd-client 127.0.0.1 -N db /dev/nbd0       # as root, elsewhere

    All commands work while a server runs, through it, and without one alike. Sizes are written as
    10G, 512M, 1.5T or bytes; units are powers of 1024. Lists and shows also come as --json.
    """
    logs.set_up_for_command()
    ctx.obj = Session(pool.absolute(), server or None, token_file, tls_ca, os.environ)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line of this process."""
    # Else numpy starts a thread for each processor, for linear algebra that nobody does here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    cli.main(args, prog_name="nbdstore")
    raise AssertionError("the command line exits by itself")
