"""``nbdstore operation`` and ``nbdstore events``: what takes long in a server, and what happens."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from nbdstore.commands.groups import OrderedGroup
from nbdstore.commands.output import json_option, print_facts, print_json, print_table
from nbdstore.commands.session import Session, pass_session
from nbdstore.control.client import ControlClient
from nbdstore.control.model import OperationInfo
from nbdstore.errors import ControlError
from nbdstore.sizes import exact_size, format_size

SIZES = frozenset(["size", "mapped", "done", "total", "bandwidth"])
"""What is in bytes of all that events tell."""

id_argument = click.argument("operation_id", metavar="ID")


@click.group(cls=OrderedGroup)
def operation() -> None:
    """List, show and cancel the operations of a server that take long.

    Those that have ended are remembered for an hour.
    """


@operation.command("list")
@json_option
@pass_session
def list_(session: Session, as_json: bool) -> None:
    """List the operations that run or ended within the hour."""
    with session.service() as service:
        infos = service.operations()
    if as_json:
        print_json([info.to_json() for info in infos])
    elif not infos:
        click.echo("no operation is running, and none ended within the hour")
    else:
        print_table(
            ("ID", "KIND", "STATE", "DONE", "OF", "PROGRESS", "STARTED"),
            [_row(info) for info in infos],
            right="DONE OF PROGRESS",
        )


def _row(info: OperationInfo) -> tuple[str, ...]:
    return (
        info.id,
        info.kind,
        info.state,
        format_size(info.done),
        format_size(info.total),
        f"{info.progress:.0%}",
        info.started,
    )


@operation.command()
@id_argument
@json_option
@pass_session
def show(session: Session, operation_id: str, as_json: bool) -> None:
    """Show operation ID: how far it is, and what it found so far."""
    with session.service() as service:
        info = service.operation(operation_id)
    _print(info, as_json)


@operation.command()
@id_argument
@json_option
@pass_session
def cancel(session: Session, operation_id: str, as_json: bool) -> None:
    """Cancel operation ID; no harm if it has ended."""
    with session.service() as service:
        info = service.cancel_operation(operation_id)
    _print(info, as_json)


def _print(info: OperationInfo, as_json: bool) -> None:
    if as_json:
        print_json(info.to_json())
        return
    facts = [
        ("operation", info.id),
        ("kind", info.kind),
        ("state", info.state + (f": {info.error['detail']}" if info.error else "")),
        (
            "progress",
            f"{info.progress:.0%}, {format_size(info.done)} of {format_size(info.total)}",
        ),
        ("started", info.started),
        ("ended", info.ended or "-"),
    ]
    facts += [
        (name, format_size(value) if name == "bytes" else str(value))
        for name, value in info.result.items()
        if not _is_list(value)
    ]
    print_facts(facts)


def _facts(detail: dict[str, Any]) -> Iterator[str]:
    """Yield what an event tells, for people."""
    for key, value in detail.items():
        if value not in (None, {}):
            is_size = key in SIZES and isinstance(value, int)
            yield f"{key}={exact_size(value) if is_size else value}"


def _is_list(value: object) -> bool:
    return isinstance(value, list)


@click.command(short_help="Follow what happens to a pool that is served.")
@json_option
@pass_session
def events(session: Session, as_json: bool) -> None:
    """Follow what happens to the pool: volumes, clients, leases, states, damage, operations.

    Runs until Ctrl-C, or until the server stops. With --json each event is a line of JSON; 'kind'
    tells what the other members are.

    \b
    Examples:
      nbdstore events
      nbdstore events --json | jq 'select(.kind == "pool.corruption")'
    """
    with session.service() as service:
        if not isinstance(service, ControlClient):
            raise ControlError("nobody serves the pool, so nothing happens to it: 'nbdstore serve'")
        for event in service.events():
            if as_json:
                click.echo(json.dumps(event, ensure_ascii=False))
            else:
                facts = " ".join(_facts(event["detail"]))
                subject = event["subject"] or "-"
                click.echo(f"{event['time']}  {event['kind']}  {subject}  {facts}".rstrip())
            sys.stdout.flush()
