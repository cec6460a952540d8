"""What the README says about containers runs, on a real engine."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.docker.engine import Engine
from tests.docker.images import base_image
from tests.docker.storage import Storage

pytestmark = [
    pytest.mark.requires("root", "dockerd", "docker", "mmdebstrap", "iptables"),
    pytest.mark.requires("slirp4netns", "/dev/net/tun", "/dev/fuse", "/dev/loop-control"),
    pytest.mark.requires("nbdfuse", "fusermount3", "mkfs.ext4", "mkfs.xfs"),
    pytest.mark.timeout(900),
]
README = (Path(__file__).parents[2] / "README.md").read_text()


def block(kind: str) -> str:
    """Return the README's only block of a kind."""
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```", README, re.M | re.S)
    return str(found)


def test_the_containers_of_the_readme(engine: Engine, tmp_path: Path) -> None:
    engine.docker("tag", base_image(engine), "debian:bookworm-slim")
    # Stands in for a database: it runs until it is told to stop, and writes where that would.
    sleeper = tmp_path / "Dockerfile"
    script = "trap 'exit 0' TERM; date >> $PGDATA/started; sleep 1000 & wait"
    sleeper.write_text(
        f"FROM {base_image(engine)}\nENV PGDATA=/var/lib/postgresql/data\n"
        f'CMD ["sh", "-c", "{script}"]\n'
    )
    engine.docker("build", "--quiet", "--tag", "postgres:16", tmp_path)
    with Storage(engine, tmp_path / "storage") as storage:
        for line in block("console docker").splitlines():
            command = line.removeprefix("# ")
            if command.endswith("&"):
                assert command in ("nbdstore agent &", "nbdstore docker-plugin &")
                continue
            assert command.startswith("docker ")
            engine.children.run("bash", "-ec", command, env={"DOCKER_HOST": engine.url})
        for n_starts in (1, 2):
            output = engine.children.run(
                *(sys.executable, "-c", block("python")),
                env={"DOCKER_HOST": engine.url},
                timeout_s=120,
            )
            assert output == "db 1 of 1 running\n"
            mount = "shop-db-data-0:/data"
            words = ("run", "--rm", "--volume", mount, base_image(engine), "cat", "/data/started")
            assert len(engine.docker(*words).splitlines()) == n_starts
        assert engine.docker("ps", "--all", "--quiet") == ""
        names = re.findall(r"^shop-\S+", storage.nbdstore("volume", "list"), re.M)
        assert names == ["shop-db-data-0", "shop-db-data-1"]
