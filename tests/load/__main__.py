"""`python -m tests.load --seed N --minutes M`: many clients, good and bad, for some time."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import click
import uvloop

from tests.children import Children
from tests.clients.served_pool import ServedPool
from tests.load.scene import Scene
from tests.seeds import told


@click.command(help="Load a served pool with many clients, some of them hostile.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--minutes", type=float, default=5.0, show_default=True)
@click.option("--connections", type=int, default=200, show_default=True)
@click.option("--exports", type=int, default=64, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="End with the figures as JSON.")
def main(seed: int, minutes: float, connections: int, exports: int, as_json: bool) -> None:
    directory = Path(tempfile.mkdtemp(prefix=f"nbdstore-load-{seed}-"))
    with Children(directory) as children:
        scene = Scene(ServedPool(children, directory), connections, exports)
        try:
            scene.prepare()
            uvloop.run(scene.run(seed, minutes * 60, lambda line: click.echo(line, err=as_json)))
            scene.check_vitals()
            scene.check_pool()
        except BaseException:
            click.echo(
                f"seed {seed} failed; the pool and the server's log are in {directory}; again: "
                f"python -m tests.load --seed {seed} --minutes {minutes} "
                f"--connections {connections} --exports {exports}",
                err=True,
            )
            raise
    shutil.rmtree(directory)
    figures = scene.to_json()
    if as_json:
        click.echo(json.dumps(figures, indent=2))
    else:
        for name, value in figures.items():
            click.echo(f"{name}: {value}")
        click.echo(told(scene.figures_by_name()))


if __name__ == "__main__":
    main()
