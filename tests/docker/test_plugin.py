"""Docker volumes on nbdstore: a real engine, real filesystems, and everything that goes away."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from nbdstore.control.client import ControlClient
from tests.docker.engine import Engine
from tests.docker.images import base_image
from tests.docker.storage import PLUGIN_SOCKET, Storage

pytestmark = [
    pytest.mark.requires("root", "dockerd", "docker", "docker-compose", "mmdebstrap", "iptables"),
    pytest.mark.requires("slirp4netns", "/dev/net/tun", "/dev/fuse", "/dev/loop-control"),
    pytest.mark.requires("nbdfuse", "fusermount3", "mkfs.ext4", "mkfs.xfs"),
    pytest.mark.timeout(900),
]


def create(engine: Engine, name: str, *options: str, status: int = 0) -> str:
    words = [word for option in options for word in ("--opt", option)]
    return engine.docker("volume", "create", "--driver", "nbdstore", *words, name, status=status)


def shell(engine: Engine, script: str, volume: str = "db", status: int | None = 0) -> str:
    """Run a script in a container of its own, with a volume at /data."""
    image = base_image(engine)
    mount = f"{volume}:/data"
    return engine.docker("run", "--rm", "-v", mount, image, "sh", "-ec", script, status=status)


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_a_volume_is_made_formatted_and_kept(storage: Storage, fs: str) -> None:
    engine = storage.engine
    create(engine, "db", "size=512M", f"fs={fs}", "owner=33:33", "mode=2770")
    assert storage.volume("db")["size"] == 512 << 20
    assert not storage.volume("db")["written"]
    output = shell(
        engine,
        "grep ' /data ' /proc/mounts; stat -c '%u:%g %a' /data; echo kept > /data/file; sync",
    )
    assert f" /data {fs} rw" in output
    assert "33:33 2770\n" in output
    # Nobody uses it: it is not mounted, and its lease is given back.
    assert json.loads(storage.nbdstore("agent", "status", "--json")) == []
    assert json.loads(storage.nbdstore("lease", "list", "--json")) == []
    assert shell(engine, "cat /data/file") == "kept\n"
    # A clone of a snapshot has what was there then, and its own life.
    storage.nbdstore("snapshot", "create", "db@nightly")
    shell(engine, "echo later > /data/file")
    # Growing a mounted ext4 wants CAP_SYS_RESOURCE, which not every machine gives.
    size = 768 if fs == "xfs" else 512
    create(engine, "copy", "clone=db@nightly", f"size={size}M")
    assert shell(engine, "cat /data/file", "copy") == "kept\n"
    assert storage.volume("copy")["size"] == size << 20
    assert "less than" in create(engine, "less", "clone=db@nightly", "size=256M", status=1)
    assert "no snapshot db@never" in create(engine, "less", "clone=db@never", status=1)
    assert "snapshot" in engine.docker("volume", "rm", "db", status=1)
    engine.docker("volume", "rm", "copy")
    storage.nbdstore("trash", "empty")
    storage.nbdstore("snapshot", "delete", "db@nightly")
    engine.docker("volume", "rm", "db")
    assert json.loads(storage.nbdstore("volume", "list", "--json")) == []


def test_a_mount_is_shared_on_a_machine_and_survives_every_restart(storage: Storage) -> None:
    engine, image = storage.engine, base_image(storage.engine)
    create(engine, "db", "size=512M")
    writer = """
    trap 'exit 0' TERM
    while :; do
        date +%s.%N >> /data/log && sync /data/log && echo ok || echo failed
        sleep 0.1
    done
    """
    mount = ("--volume", "db:/data")
    engine.docker("run", "--detach", "--name", "writer", *mount, image, "sh", "-c", writer)

    def advance() -> None:
        """Wait until the writer has written more, without an error."""
        n_lines = len(engine.docker("logs", "writer").splitlines())
        deadline = time.monotonic() + 60
        while len(lines := engine.docker("logs", "writer").splitlines()) < n_lines + 3:
            assert time.monotonic() < deadline, lines[-3:]
            time.sleep(0.1)
        assert set(lines) == {"ok"}

    advance()
    # A second container shares the mount; the first keeps it when the second has gone.
    n_lines = int(shell(engine, "wc -l < /data/log; echo second > /data/second"))
    assert n_lines >= 3
    advance()
    # A volume in use is neither removed, nor lost to a plugin that is killed.
    assert "in use" in engine.docker("volume", "rm", "db", status=1)
    for name in ("plugin", "agent", "server"):
        storage.kill(name)
        storage.start(name)
        advance()
    assert "attached" in engine.docker("volume", "inspect", "db")
    # The agent has reconnected; a container that starts now finds it all.
    assert shell(engine, "cat /data/second") == "second\n"

    # dockerd is killed, and ends what runs when it comes back.
    engine.kill()
    engine.start()
    assert engine.inspect("writer")["State"]["Running"] is False
    engine.docker("start", "writer")
    advance()
    engine.docker("stop", "writer")
    assert json.loads(storage.nbdstore("agent", "status", "--json")) == []
    engine.docker("start", "writer")
    advance()
    # dockerd is killed, and lets what runs go on (live restore): it does not mount it again, but
    # unmounts it in the end.
    engine.kill()
    engine.start("--live-restore")
    advance()
    engine.docker("stop", "writer")
    assert json.loads(storage.nbdstore("agent", "status", "--json")) == []
    # dockerd stops, and the plugin ends meanwhile: they find each other again.
    engine.stop()
    storage.end("plugin")
    storage.start("plugin")
    engine.start()
    assert [item["Name"] for item in volumes(engine)] == ["db"]
    assert int(shell(engine, "wc -l < /data/log")) >= n_lines
    engine.docker("rm", "writer")
    engine.docker("volume", "rm", "db")


def volumes(engine: Engine) -> list[dict[str, str]]:
    output = engine.docker("volume", "ls", "--format", "{{json .}}")
    return [json.loads(line) for line in output.splitlines()]


def test_names_that_clash_and_options_that_make_no_sense(storage: Storage) -> None:
    engine = storage.engine
    storage.nbdstore("volume", "create", "mine", "--size", "300M")
    # A volume of the store is used as it is, and stays when Docker forgets it.
    assert "300 MiB and not 1 GiB" in create(engine, "mine", "size=1G", status=1)
    create(engine, "mine")
    shell(engine, "echo kept > /data/file", "mine")
    engine.docker("volume", "rm", "mine")
    assert storage.volume("mine")["written"]
    # What a name that another machine took over holds is not deleted from here.
    create(engine, "other", "size=300M")
    storage.nbdstore("volume", "delete", "other")
    storage.nbdstore("volume", "create", "other", "--size", "400M")
    engine.docker("volume", "rm", "other")
    assert storage.volume("other")["size"] == 400 << 20

    for options, complaint in (
        ((), "say with '-o size=10G' how large to make it"),
        (("size=10GB",), "units are powers of 1024"),
        (("size=1G", "fs=zfs"), "fs=zfs: give ext4 or xfs"),
        (("siez=1G",), "there is no option 'siez'"),
        (("size=1",), "512"),
        (("size=1G", "iops=many"), "give a number"),
    ):
        assert complaint in create(engine, "wrong", *options, status=1)
    assert volumes(engine) == []
    for name in ("mine", "other"):
        storage.nbdstore("volume", "delete", name)

    # One machine has it: here an attachment of another holder.
    create(engine, "db", "size=300M", "iops=1000", "bandwidth=100M")
    assert storage.volume("db")["iops"] == 1000
    client = ControlClient(storage.env["NBDSTORE_SERVER"])
    lease = client.acquire_lease("db", "elsewhere")
    assert "elsewhere" in shell(engine, "true", "db", status=125)
    client.release_lease("db", "elsewhere", lease.epoch)
    shell(engine, "true", "db")


def test_compose_makes_uses_and_removes_volumes(storage: Storage, tmp_path: Path) -> None:
    engine = storage.engine
    file = tmp_path / "docker-compose.yml"
    file.write_text(
        f"""
        version: "3"
        services:
          app:
            image: {base_image(engine)}
            command: sh -c "date >> /data/starts && wc -l < /data/starts"
            volumes: ["db:/data"]
        volumes:
          db:
            driver: nbdstore
            driver_opts: {{size: 300M, fs: xfs}}
        """
    )
    project = ("--project-name", "shop")
    for n_starts in (1, 2):
        output = engine.compose(file, *project, "up", "--no-color")
        assert re.search(rf"^app_1 .*\| {n_starts}$", output, re.M), output
        engine.compose(file, *project, "down")
        assert storage.volume("shop_db")["size"] == 300 << 20
    engine.compose(file, *project, "down", "--volumes")
    assert "was deleted" in storage.nbdstore("volume", "show", "shop_db", status=1)


@pytest.mark.requires("podman")
def test_podman_uses_the_same_plugin(storage: Storage, tmp_path: Path) -> None:
    engine, image = storage.engine, base_image(storage.engine)
    configuration = tmp_path / "containers.conf"
    configuration.write_text(
        f"""
        [engine]
        cgroup_manager = "cgroupfs"
        events_logger = "none"
        [engine.volume_plugins]
        nbdstore = "{PLUGIN_SOCKET}"
        """
    )

    def podman(*words: str, status: int = 0) -> str:
        places = ("--root", str(tmp_path / "root"), "--runroot", "/run/docker/podman")
        env = {"CONTAINERS_CONF": str(configuration)}
        return engine.machine.run("podman", *places, *words, env=env, status=status, timeout_s=120)

    def shell(script: str) -> str:
        return podman(
            *("run", "--rm", "--network=none", "--volume=db:/data", image, "sh", "-ec", script)
        )

    archive = tmp_path / "image.tar"
    engine.docker("save", "--output", archive, image)
    podman("load", "--quiet", "--input", str(archive))
    create = ("volume", "create", "--driver=nbdstore")
    assert "give ext4 or xfs" in podman(*create, "--opt=fs=zfs", "wrong", status=125)
    podman(*create, "--opt=size=300M", "--opt=fs=xfs", "db")
    assert " /data xfs rw" in shell("grep /data /proc/mounts; echo kept > /data/file")
    assert shell("cat /data/file") == "kept\n"
    assert json.loads(storage.nbdstore("lease", "list", "--json")) == []
    podman("volume", "rm", "db")
    assert "was deleted" in storage.nbdstore("volume", "show", "db", status=1)


def test_a_server_that_is_away(storage: Storage) -> None:
    engine = storage.engine
    create(engine, "db", "size=300M")
    shell(engine, "echo kept > /data/file")
    storage.kill("server")
    # Docker knows the volume still, also one that starts meanwhile, and tells why it cannot be had.
    engine.stop()
    engine.start()
    assert [item["Name"] for item in volumes(engine)] == ["db"]
    for output in (
        create(engine, "new", "size=300M", status=1),
        shell(engine, "true", status=125),
        engine.docker("volume", "rm", "db", status=1),
    ):
        assert "no server answers" in output
    storage.start("server")
    assert shell(engine, "cat /data/file") == "kept\n"
    create(engine, "new", "size=300M")
    assert sorted(item["Name"] for item in volumes(engine)) == ["db", "new"]


def test_a_pool_that_is_full_holds_writes_until_there_is_space(storage: Storage) -> None:
    engine = storage.engine
    # Or else writes are held for a moment only, while deleted volumes make room.
    storage.nbdstore("trash", "empty")
    create(engine, "db", "size=4G")
    script = "dd if=/dev/urandom of=/data/file bs=1M count=600 conv=fsync 2>&1 | tail -1"
    engine.docker(
        *("run", "--detach", "--name", "filler", "--volume", "db:/data"),
        *(base_image(engine), "sh", "-c", script),
    )
    deadline = time.monotonic() + 120
    while json.loads(storage.nbdstore("pool", "show", "--json"))["held_writes"] == 0:
        assert time.monotonic() < deadline
        assert engine.inspect("filler")["State"]["Running"]
    assert "before making new volumes" in create(engine, "another", "size=300M", status=1)
    assert engine.inspect("filler")["State"]["Running"]
    storage.nbdstore("pool", "grow", "2G")
    assert engine.docker("wait", "filler", timeout_s=120) == "0\n"
    assert "629145600 bytes" in engine.docker("logs", "filler")
