"""What ``nbdstore serve`` says when it is ready: the exports' addresses, and how to attach them."""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import click

from nbdstore.commands.output import print_table
from nbdstore.control.contracts import VolumeLike
from nbdstore.sizes import format_size

N_SHOWN = 10
"""Exports listed by name; a pool may have hundreds."""
WILDCARDS = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class Address:
    """Where a client finds the server: (host, port), or the path of a unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``HOST:PORT``, ``[HOST]:PORT`` or ``unix:PATH``, as `Server.addresses` has them.

        An address that stands for all of the machine's becomes the machine's name.
        """
        if text.startswith("unix:"):
            return cls(path=text.removeprefix("unix:"))
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        return cls(host=socket.gethostname() if host in WILDCARDS else host, port=int(port))

    def uri(self, export: str, *, tls: bool) -> str:
        """Return the NBD URI of an export (nbd-uri specification)."""
        scheme = "nbds" if tls else "nbd"
        name = quote(export, safe="")
        if self.path:
            return f"{scheme}+unix:///{name}?socket={quote(self.path)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}/{name}"

    def nbd_client(self, export: str) -> str:
        """Return the command that attaches an export to the kernel."""
        target = f"-unix {shlex.quote(self.path)}" if self.path else f"{self.host} {self.port}"
        return f"nbd-client {target} -N {export} /dev/nbd0"


def show(
    directory: str,
    volumes: Iterable[VolumeLike],
    addresses: Sequence[str],
    *,
    tls: bool,
    read_only: bool = False,
) -> None:
    """Print where each volume is, and the lines that attach the first of them."""
    found = sorted(volumes, key=lambda volume: volume.name)
    places = [Address.parse(text) for text in addresses]
    how = ", read-only," if read_only else ""
    click.echo(f"serving pool {directory}{how} at {', '.join(addresses) or 'passed sockets'}")
    if not found:
        click.echo("no volumes yet: make one with 'nbdstore volume create NAME --size SIZE'")
    if found and places:
        click.echo()
        rows = [
            (volume.name, format_size(volume.size), places[0].uri(volume.name, tls=tls))
            for volume in found[:N_SHOWN]
        ]
        print_table(("EXPORT", "SIZE", "URI"), rows, right="SIZE")
        if len(found) > N_SHOWN:
            click.echo(f"and {len(found) - N_SHOWN} more: 'nbdstore volume list'")
        _show_attach_lines(found[0].name, places[0], tls=tls)
    sys.stdout.flush()


def _show_attach_lines(export: str, place: Address, *, tls: bool) -> None:
    uri = shlex.quote(place.uri(export, tls=tls))
    with_tls = " (and -certfile, -keyfile, -cacertfile)" if tls else ""
    click.echo()
    click.echo("attach it:")
    click.echo(f"  {place.nbd_client(export)}    # as root{with_tls}")
    click.echo(f"  nbdinfo {uri}")
    click.echo(f"  qemu-img info {uri}")
    click.echo()
    click.echo("Ctrl-C stops.")
