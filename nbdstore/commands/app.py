"""``nbdstore app``: applications on Docker or Kubernetes whose data is on block storage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from nbdstore.commands.groups import OrderedGroup
from nbdstore.commands.output import json_option, note, print_json, print_table
from nbdstore.errors import NotFound
from nbdstore.orchestration import AppStatus, Orchestration
from nbdstore.orchestration.app_file import read_app_file

file_argument = click.argument("file", type=click.Path(path_type=Path))


@click.group(cls=OrderedGroup)
def app() -> None:
    """Run applications in containers, with their data on block storage.

    FILE says in YAML what should run, and on which platform:

    \b
      name: shop
      platform: docker              # or kubernetes
      apps:
        db:
          image: postgres:16
          env: {POSTGRES_PASSWORD: secret}
          ports: {5432: 5432}
          volumes:
            data: {path: /var/lib/postgresql/data, size: 10G, fs: xfs}

    Each replica has volumes of its own, PROJECT-APP-VOLUME-NUMBER, which the platform's driver for
    nbdstore makes. They stay when an application goes.
    """


@app.command()
@file_argument
@json_option
def up(file: Path, as_json: bool) -> None:
    """Make everything in FILE run as it says.

    Done again it changes nothing; after a failure it completes what was begun. What has changed in
    FILE is replaced, one replica after the other, with its data.
    """
    with _orchestration(file) as orchestration:
        statuses = orchestration.start()
        _show(statuses, as_json)
        left = [status.name for status in statuses if status.wanted is None]
    if left:
        note(
            f"{', '.join(left)}: not in {file} any more, and running; 'nbdstore app down' ends all"
        )


@app.command()
@file_argument
@click.option("--delete-volumes", is_flag=True, help="Delete the volumes and their data, too.")
def down(file: Path, delete_volumes: bool) -> None:
    """Stop and remove everything of the project that FILE names. Its volumes stay."""
    with _orchestration(file) as orchestration:
        orchestration.stop_all(delete_volumes=delete_volumes)
        click.echo(f"{orchestration.name} is down" + (", its volumes deleted" * delete_volumes))


@app.command()
@file_argument
@json_option
def ps(file: Path, as_json: bool) -> None:
    """Show the replicas of the project that FILE names."""
    with _orchestration(file) as orchestration:
        _show(orchestration.status(), as_json)


@app.command()
@file_argument
@click.argument("name", required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on with what is written from now on.")
def logs(file: Path, name: str | None, follow: bool) -> None:
    """Show what application NAME, or all, have written."""
    with _orchestration(file) as orchestration:
        if name is not None and name not in orchestration.apps:
            raise NotFound(
                f"{file} has no application '{name}': it has {', '.join(orchestration.apps)}"
            )
        for line in orchestration.logs(name, follow=follow):
            click.echo(f"{line.replica}  {line.text}")


@contextlib.contextmanager
def _orchestration(file: Path) -> Iterator[Orchestration]:
    said = read_app_file(file)
    with Orchestration(said.platform, name=said.name) as orchestration:
        for item in said.apps:
            orchestration.add_container_app(item)
        yield orchestration


def _show(statuses: Sequence[AppStatus], as_json: bool) -> None:
    if as_json:
        print_json([status.to_json() for status in statuses])
        return
    rows = []
    for status in statuses:
        for replica in status.replicas:
            state = f"{replica.state} ({replica.message})" if replica.message else replica.state
            restarts = str(replica.restarts)
            rows.append((status.name, replica.name, state, restarts, status.image))
        for _ in range(max(0, (status.wanted or 0) - len(status.replicas))):
            rows.append((status.name, "-", "absent", "-", status.image))
    print_table(("APP", "REPLICA", "STATE", "RESTARTS", "IMAGE"), rows, right="RESTARTS")
