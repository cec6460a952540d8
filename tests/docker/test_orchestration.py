"""Applications on a real Docker engine: their life, their data, and failures in the middle."""

from __future__ import annotations

import gc
import json
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

pytestmark = [
    pytest.mark.requires("root", "dockerd", "docker", "mmdebstrap", "iptables"),
    pytest.mark.requires("slirp4netns", "/dev/net/tun"),
    pytest.mark.timeout(900),
]

# Writes a line into its volume at each start, and stops when it is told to.
APPLICATION = """
trap 'exit 0' TERM
echo "$WORD" >> /data/starts
echo "started with $WORD"
while :; do sleep 1000 & wait $!; done
"""


def application(image: str, word: str, replicas: int = 1) -> ContainerApp:
    return ContainerApp(
        "writer",
        image,
        command=["sh", "-c", APPLICATION],
        volumes=[Volume("data", "/data", driver="local")],
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
        shop.add_container_app(application(image, "one", replicas=2))
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
            later.add_container_app(application(image, "two", replicas=2))
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


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_second_start_completes_what_any_failure_interrupted(engine: Engine, done: bool) -> None:
    image = base_image(engine)
    with FaultyEngine(engine.socket) as faulty:
        faulty.expect()
        run(engine, "whole", application(image, "0"), faulty.url)
        n_first = len(faulty.calls)
        assert n_first >= 4, faulty.calls  # network, volume, container, start
        faulty.expect()
        run(engine, "whole", application(image, "1"), faulty.url)
        n_change = len(faulty.calls)
        assert n_change >= 4, faulty.calls  # stop, remove, create, start
        faulty.expect()
        run(engine, "whole", application(image, "1"), faulty.url)
        assert faulty.calls == []

        for fails in range(1, n_first + 1):
            project = f"part{fails}"
            faulty.expect(fails, done=done)
            with pytest.raises(PlatformError, match="do it again"):
                run(engine, project, application(image, "0"), faulty.url)
            run(engine, project, application(image, "0"))
            assert starts(engine, f"{project}-writer-0")[-1] == "0"
            assert len(engine.docker("ps", "-aq", "--filter", f"name={project}-").split()) == 1
            assert engine.docker("volume", "ls", "-q", "--filter", f"name={project}-") == (
                f"{project}-writer-data-0\n"
            )
        words = starts(engine, "whole-writer-0")
        for fails in range(1, n_change + 1):
            words.append(f"change{fails}")
            faulty.expect(fails, done=done)
            with pytest.raises(PlatformError, match="do it again"):
                run(engine, "whole", application(image, words[-1]), faulty.url)
            run(engine, "whole", application(image, words[-1]))
            assert starts(engine, "whole-writer-0") == words
            assert len(engine.docker("ps", "-aq", "--filter", "name=whole-").split()) == 1


def test_what_cannot_be_is_refused_before_anything_is_made(engine: Engine) -> None:
    image = base_image(engine)
    options = ("--opt", "type=tmpfs", "--opt", "device=tmpfs")
    engine.docker("volume", "create", *options, "shop-writer-data-1")
    engine.docker("create", "--name", "other-writer-0", image, "true")
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
    refuse(AlreadyExists, "docker rm other-writer-0", application(image, ""), "other")
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
