"""The Compose file's containers with the kernel's nbd driver, in a guest whose kernel has it.

Emulated, it takes minutes: ``make compose-kernel-test`` runs it, and the tests of every day, which
do not look into a file of this name, do not.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.children import Children
from tests.docker.engine import Engine
from tests.docker.guest_engine import WAIT, GuestEngine
from tests.docker.images import ROOT, base_image
from tests.guest.guest import Guest

pytestmark = [
    pytest.mark.requires("root", "dockerd", "docker", "docker-compose", "mmdebstrap", "iptables"),
    pytest.mark.requires("slirp4netns", "/dev/net/tun", "curl"),
    pytest.mark.requires("qemu-system-x86_64", "busybox", "modprobe", "depmod"),
    # The images may have to be made first.
    pytest.mark.timeout(900),
]

PROJECT = "kernel"
MOUNTS = "/run/volumes"
MOUNTED = f"{MOUNTS}/sample"
MEMORY_MIB = 2048


def test_an_agent_in_a_container_attaches_with_the_kernels_driver(
    engine: Engine, children: Children, tmp_path: Path
) -> None:
    """Without --profile the file means the profile "kernel" (see .env), and that works."""
    env = {"COMPOSE_PROJECT_NAME": PROJECT, "NBDSTORE_MOUNTS": MOUNTS}
    env["NBDSTORE_BASE"] = base_image(engine)
    engine.compose(ROOT / "docker-compose.yml", "up", "--no-start", env=env, timeout_s=600)
    label = '{{.Label "com.docker.compose.service"}} {{.ID}}'
    lines = engine.docker("ps", "--all", "--format", label).splitlines()
    made = {service: engine.inspect(name) for service, name in map(str.split, lines)}
    assert sorted(made) == ["agent", "app", "server"]

    with Guest(children, tmp_path, memory_mib=MEMORY_MIB) as guest:
        guest.run(f"mkdir {MOUNTS}")
        guest_engine = GuestEngine(guest, engine, tmp_path)
        guest_engine.docker("network", "create", f"{PROJECT}_default")
        for service, like in made.items():
            guest_engine.create(service, like)
        _goes_through_restarts(guest, guest_engine)


def _goes_through_restarts(guest: Guest, engine: GuestEngine) -> None:
    engine.docker("start", "server", "agent")
    guest.run(f"until grep -q '^/dev/nbd0 {MOUNTED} ext4 rw' /proc/mounts; do {WAIT}; done")
    engine.docker("start", "app")
    first = advance(engine)
    assert "attached volume sample as /dev/nbd0" in engine.docker("logs", "agent")

    # The mount and the application outlive both; its requests wait for the server.
    for service in ("server", "agent"):
        engine.docker("kill", service)
    engine.docker("start", "server", "agent")
    second = advance(engine)
    assert second[: len(first)] == first
    assert engine.docker("inspect", "--format", "{{.RestartCount}}", "app") == "0\n"

    for service in ("app", "agent", "server"):  # docker would stop them all at once
        engine.docker("stop", service)
    states = engine.docker("inspect", "--format", "{{.State.ExitCode}}", "app", "agent", "server")
    assert states == "0\n0\n0\n"
    assert MOUNTED not in guest.run("cat /proc/mounts")
    engine.docker("start", "server", "agent")
    guest.run(f"until grep -q ' {MOUNTED} ext4 rw' /proc/mounts; do {WAIT}; done")
    engine.docker("start", "app")
    assert advance(engine)[: len(second)] == second
    guest.run("! dmesg | grep -E 'I/O error|EXT4-fs error|EXT4-fs warning'")


def advance(engine: GuestEngine) -> list[str]:
    """Wait until the application has written more; return all, as its container sees it."""
    path = "/mnt/nbdstore/sample/log"
    script = (
        f"n=$(wc -l <{path} || echo 0); until [ $(wc -l <{path} || echo 0) -gt $n ]; "
        f"do sleep 0.1; done; cat {path}"
    )
    return engine.docker("exec", "app", "sh", "-c", f"'{script}'").splitlines()
