"""Applications on a real Docker engine: their life, their data, and failures in the middle."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import sys
import warnings
from pathlib import Path

import pytest

from nbdstore.errors import AlreadyExists, InvalidArgument, PlatformError
from nbdstore.orchestration import ContainerApp, Orchestration, Volume
from nbdstore.orchestration.docker_platform import DockerPlatform
from tests.docker.engine import Engine
from tests.docker.faulty_engine import FaultyEngine
from tests.docker.images import base_image
from tests.docker.storage import Storage

pytestmark = [
    pytest.mark.requires("root", "dockerd", "docker", "mmdebstrap", "iptables"),
    pytest.mark.requires("slirp4netns", "/dev/net/tun"),
    pytest.mark.timeout(900),
]

storage_programs = pytest.mark.requires(
    *("/dev/fuse", "/dev/loop-control", "nbdfuse", "fusermount3", "mkfs.ext4", "mkfs.xfs")
)

# Writes a line into its volume at each start, and stops when it is told to.
APPLICATION = """
trap 'exit 0' TERM
echo "$WORD" >> /data/starts
echo "started with $WORD"
while :; do sleep 1000 & wait $!; done
"""


LOCAL = Volume("data", "/data", driver="local")
STORED = Volume("data", "/data", size="300M")


def application(
    image: str, word: str, *volumes: Volume, replicas: int = 1, name: str = "writer"
) -> ContainerApp:
    return ContainerApp(
        name,
        image,
        command=["sh", "-c", APPLICATION],
        volumes=volumes,
        env={"WORD": word},
        replicas=replicas,
    )


def starts(engine: Engine, replica: str) -> list[str]:
    """Return the words that a replica has written at its starts."""
    return engine.docker("exec", replica, "cat", "/data/starts").split()


def run(engine: Engine, name: str, app: ContainerApp, url: str | None = None) -> None:
    with Orchestration(DockerPlatform(url or engine.url), name=name) as orchestration:
        orchestration.add_container_app(app)
        (status,) = orchestration.start()
        assert status.running == app.replicas


def test_an_application_starts_scales_changes_and_stops_and_keeps_its_data(engine: Engine) -> None:
    image = base_image(engine)
    with Orchestration(DockerPlatform(engine.url), name="shop") as shop:
        shop.add_container_app(application(image, "one", LOCAL, replicas=2))
        (status,) = shop.start()
        assert [(replica.name, replica.state) for replica in status.replicas] == [
            ("shop-writer-0", "running"),
            ("shop-writer-1", "running"),
        ]
        since = [replica.since for replica in status.replicas]
        (status,) = shop.start()
        assert [replica.since for replica in status.replicas] == since

        status = shop.scale("writer", 1)
        assert [replica.name for replica in status.replicas] == ["shop-writer-0"]
        assert status.replicas[0].since == since[0]
        shop.scale("writer", 2)
        assert starts(engine, "shop-writer-1") == ["one", "one"]

        with Orchestration(DockerPlatform(engine.url), name="shop") as later:
            later.add_container_app(application(image, "two", LOCAL, replicas=2))
            later.start()
            assert starts(engine, "shop-writer-0") == ["one", "two"]
            assert [line.text for line in later.logs("writer")] == ["started with two"] * 2
            engine.docker("kill", "shop-writer-0")
            assert later.status()[0].running == 1
            later.start()
            assert starts(engine, "shop-writer-0") == ["one", "two", "two"]

        shop.stop()
        assert shop.status()[0].replicas == []
        assert engine.docker("network", "ls", "--quiet", "--filter=name=shop") == ""
        shop.start()
        assert starts(engine, "shop-writer-0") == ["one", "two", "two", "one"]
        shop.stop(delete_volumes=True)
        assert engine.docker("volume", "ls", "--quiet") == ""


@storage_programs
def test_what_changes_of_an_application_finds_its_data(storage: Storage) -> None:
    """Another image, environment and command, a larger volume, one more, and one less."""
    engine, images = storage.engine, [base_image(storage.engine), "nbdstore-tests/changed"]
    engine.docker("build", "--tag", images[1], "-", stdin=f"FROM {images[0]}\nENV CHANGED=yes\n")
    # Growing a mounted ext4 wants CAP_SYS_RESOURCE, which not every machine gives.
    data = Volume("data", "/data", size="300M", fs="xfs")
    more = Volume("more", "/more", size="300M")

    run(engine, "shop", application(images[0], "one", data))
    run(engine, "shop", application(images[1], "two", data))
    assert starts(engine, "shop-writer-0") == ["one", "two"]
    assert "yes" in engine.docker("exec", "shop-writer-0", "sh", "-c", "echo $CHANGED")
    run(engine, "shop", application(images[1], "three", data, more))
    engine.docker("exec", "shop-writer-0", "sh", "-c", "echo kept > /more/file")

    # A volume is never changed by itself: what to do is said, does it, and counts at once.
    larger = dataclasses.replace(data, size="400M")
    with pytest.raises(InvalidArgument, match="and should have 400 MiB") as refused:
        run(engine, "shop", application(images[1], "four", larger, more))
    (advice,) = re.findall("'nbdstore (.*)'", str(refused.value))
    storage.nbdstore(*advice.split())
    run(engine, "shop", application(images[1], "four", larger, more))
    with Orchestration(DockerPlatform(engine.url), name="shop") as shop:
        shop.stop_all()
    storage.nbdstore("volume", "resize", "shop-writer-data-0", "500M")
    run(engine, "shop", application(images[0], "five", dataclasses.replace(data, size="500M")))
    assert storage.volume("shop-writer-data-0")["size"] == 500 << 20
    run(engine, "shop", application(images[0], "six", data, more))
    assert starts(engine, "shop-writer-0") == ["one", "two", "three", "four", "five", "six"]
    assert engine.docker("exec", "shop-writer-0", "cat", "/more/file") == "kept\n"


@storage_programs
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_second_start_completes_what_any_failure_interrupted(
    storage: Storage, done: bool
) -> None:
    """A first start, and changes: each with another word, and another second volume."""
    engine, image = storage.engine, base_image(storage.engine)

    def changed(word: str) -> ContainerApp:
        return application(image, word, STORED, Volume(f"more{word}", "/more", driver="local"))

    with FaultyEngine(engine.socket) as faulty:
        faulty.expect()
        run(engine, "whole", application(image, "0", STORED), faulty.url)
        first = faulty.calls
        assert len(first) >= 4, first  # network, volume, container, start
        faulty.expect()
        run(engine, "whole", changed("1"), faulty.url)
        change = faulty.calls
        assert len(change) >= 5, change  # volume, stop, remove, container, start
        faulty.expect()
        run(engine, "whole", changed("1"), faulty.url)
        assert faulty.calls == []

        for fails in range(1, len(first) + 1):
            project, app = f"part{fails}", application(image, "0", STORED)
            faulty.expect(fails, done=done)
            with pytest.raises(PlatformError, match="do it again"):
                run(engine, project, app, faulty.url)
            run(engine, project, app)
            assert starts(engine, f"{project}-writer-0")[-1] == "0"
            assert len(engine.docker("ps", "-aq", "--filter", f"name={project}-").split()) == 1
            assert engine.docker("volume", "ls", "-q", "--filter", f"name={project}-") == (
                f"{project}-writer-data-0\n"
            )
        words = starts(engine, "whole-writer-0")
        for fails in range(1, len(change) + 1):
            words.append(f"change{fails}")
            faulty.expect(fails, done=done)
            with pytest.raises(PlatformError, match="do it again"):
                run(engine, "whole", changed(words[-1]), faulty.url)
            run(engine, "whole", changed(words[-1]))
            assert starts(engine, "whole-writer-0") == words
            assert len(engine.docker("ps", "-aq", "--filter", "name=whole-").split()) == 1


def test_what_cannot_be_is_refused_before_anything_is_made(engine: Engine) -> None:
    image = base_image(engine)
    options = ("--opt", "type=tmpfs", "--opt", "device=tmpfs")
    engine.docker("volume", "create", *options, "shop-writer-data-1")
    engine.docker("create", "--name", "other-writer-0", image, "true")
    labels = ("--label", "nbdstore.project=shop", "--label", "nbdstore.app=db-a")
    engine.docker("volume", "create", *labels, "shop-db-a-data-0")
    engine.docker("create", *labels, "--name", "old-db-a-0", image, "true")
    before = engine.docker("ps", "--all", "--quiet")

    def refuse(error: type[Exception], match: str, app: ContainerApp, name: str = "shop") -> None:
        with Orchestration(DockerPlatform(engine.url), name=name) as orchestration:
            orchestration.add_container_app(app)
            with pytest.raises(error, match=match):
                orchestration.start()
        assert engine.docker("ps", "--all", "--quiet") == before

    refuse(PlatformError, "pull image no-such-image", ContainerApp("writer", "no-such-image"))
    refuse(
        InvalidArgument,
        "only one container of a host can have port 80",
        ContainerApp("web", image, ports={80: 80}, replicas=2),
    )
    refuse(AlreadyExists, "docker rm other-writer-0", application(image, "", LOCAL), "other")
    for name in ("shop-db", "old-db"):  # of the one the volume is there, of the other the container
        refuse(
            AlreadyExists,
            "that is of application db-a of project shop: rename the project or the application",
            ContainerApp("a", image, volumes=[LOCAL]),
            name,
        )
    assert "old-db-a-data-0" not in engine.docker("volume", "ls", "--quiet")
    refuse(
        InvalidArgument,
        "created with type=tmpfs, and now type=ext4",
        ContainerApp(
            "writer",
            image,
            volumes=[Volume("data", "/data", driver="local", options={"type": "ext4"})],
            replicas=2,
        ),
    )
    refuse(
        InvalidArgument,
        "of driver local, not nbdstore",
        ContainerApp("writer", image, volumes=[Volume("data", "/d", size="1G")], replicas=2),
    )


def test_an_engine_that_is_away_is_told(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        # The client library leaves a socket that could not connect to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        with pytest.raises(PlatformError, match="no Docker engine answers"):
            DockerPlatform(f"unix://{tmp_path}/none.sock")
        gc.collect()


def test_the_command_line_does_the_same_from_a_file(engine: Engine, tmp_path: Path) -> None:
    image = base_image(engine)
    file = tmp_path / "shop.yaml"
    file.write_text(
        f"""
        name: shop
        apps:
          writer:
            image: {image}
            command: {json.dumps(["sh", "-c", APPLICATION])}
            env: {{WORD: file}}
            volumes:
              data: {{path: /data, driver: local}}
        """
    )
    pool = tmp_path / "pool"

    def nbdstore(*words: str, status: int = 0, **env: str) -> str:
        return engine.children.run(
            *(sys.executable, "-m", "nbdstore", "--pool", str(pool), *words),
            status=status,
            env={"DOCKER_HOST": engine.url, **env},
        )

    assert "shop-writer-0  running" in nbdstore("app", "up", str(file))
    (app,) = json.loads(nbdstore("app", "ps", str(file), "--json"))
    assert (app["wanted"], app["running"], len(app["replicas"])) == (1, 1, 1)
    assert nbdstore("app", "logs", str(file), "writer") == "shop-writer-0  started with file\n"
    assert "it has writer" in nbdstore("app", "logs", str(file), "reader", status=1)

    # What the platform gave to its containers is C_c; of it, what this one has written.
    engine.docker("exec", "shop-writer-0", "sh", "-c", "head -c 3M /dev/zero > /written")
    nbdstore("pool", "create", "--capacity", "64M")
    report = json.loads(nbdstore("capacity", "--json", NBDSTORE_PLATFORM="docker"))
    assert report["n_containers"] == 1
    assert 3 << 20 <= report["container_capacity"] < 4 << 20
    assert report["integrated_capacity"] == (64 << 20) + report["container_capacity"]

    assert nbdstore("app", "down", str(file)) == "shop is down\n"
    assert "absent" in nbdstore("app", "ps", str(file))
    assert engine.docker("volume", "ls", "--quiet") == "shop-writer-data-0\n"
    assert nbdstore("app", "down", str(file), "--delete-volumes") == (
        "shop is down, its volumes deleted\n"
    )
    assert engine.docker("volume", "ls", "--quiet") == ""
