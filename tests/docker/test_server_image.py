"""The server's image: what it serves, as whom, and what outlives a container."""

from __future__ import annotations

import pytest

from tests.docker.engine import Engine
from tests.docker.images import base_image, build

pytestmark = [
    pytest.mark.requires("root", "dockerd", "docker", "mmdebstrap", "iptables"),
    pytest.mark.requires("slirp4netns", "/dev/net/tun"),
    # The images may have to be made first.
    pytest.mark.timeout(900),
]

PATTERN = "4e"  # of qemu-io
SIZE_LIMIT_BYTES = 230 << 20


def serve(engine: Engine, image: str, *words: str) -> str:
    """Start a server on the volume ``pool``, and return its address once it is healthy."""
    engine.docker(
        *("run", "--detach", "--name", "server", "--volume", "pool:/var/lib/nbdstore"),
        *("--health-interval", "1s", "--health-retries", "1"),
        *("--read-only", "--cap-drop", "ALL", image, *words),
    )
    engine.wait_health("server")
    return str(engine.inspect("server")["NetworkSettings"]["IPAddress"])


@pytest.mark.requires("qemu-io", "nbdinfo")
def test_a_server_has_no_rights_and_its_data_outlives_its_container(engine: Engine) -> None:
    image = build(engine, "server")
    address = serve(engine, image)
    engine.docker("exec", "server", "nbdstore", "volume", "create", "db", "--size", "1G")
    uri = f"nbd://{address}/db"
    engine.machine.run("qemu-io", "-f", "raw", uri, "-c", f"write -P 0x{PATTERN} 5M 3M")
    status = engine.docker("exec", "server", "cat", "/proc/1/status")
    assert "Uid:\t10809\t10809\t10809\t10809\n" in status
    assert "CapEff:\t0000000000000000\n" in status

    # A container that is killed and removed, and one that stops in peace.
    engine.docker("rm", "--force", "server")
    address = serve(engine, image)
    uri = f"nbd://{address}/db"
    engine.machine.run("qemu-io", "-f", "raw", uri, "-c", f"read -P 0x{PATTERN} 5M 3M")
    engine.docker("stop", "server")
    assert engine.inspect("server")["State"]["ExitCode"] == 0
    engine.docker("rm", "server")
    address = serve(engine, image)
    assert engine.machine.run("nbdinfo", "--size", f"nbd://{address}/db") == "1073741824\n"

    # A server that answers nobody is not healthy.
    engine.docker("exec", "server", "rm", "/var/lib/nbdstore/control.sock")
    engine.wait_health("server", "unhealthy")


def test_the_image_is_small(engine: Engine) -> None:
    image = build(engine, "server")
    sizes = [engine.inspect(name, "image")["Size"] for name in (image, base_image(engine))]
    assert sizes[0] - sizes[1] < SIZE_LIMIT_BYTES
