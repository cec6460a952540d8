"""The Compose file: its services run, and what the application writes survives all of them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.docker.engine import Engine
from tests.docker.images import ROOT, base_image

pytestmark = [
    pytest.mark.requires("root", "dockerd", "docker", "docker-compose", "mmdebstrap", "iptables"),
    pytest.mark.requires("slirp4netns", "/dev/net/tun", "/dev/fuse", "/dev/loop-control"),
    # The images may have to be made first.
    pytest.mark.timeout(900),
]


class Project:
    """The Compose file with the fuse profile, in an engine."""

    def __init__(self, engine: Engine, mounts: Path, fs: str) -> None:
        self.engine = engine
        self.env = {
            "NBDSTORE_BASE": base_image(engine),
            "NBDSTORE_MOUNTS": str(mounts),
            "NBDSTORE_FS": fs,
            "COMPOSE_PROJECT_NAME": f"sample-{fs}",
        }

    def compose(self, *words: str, timeout_s: float = 300) -> str:
        __tracebackhide__ = True
        words = ("--profile", "fuse", *words)
        file = ROOT / "docker-compose.yml"
        return self.engine.compose(file, *words, timeout_s=timeout_s, env=self.env)

    def container(self, service: str) -> str:
        """Return the id of a service's container."""
        labels = {"project": self.env["COMPOSE_PROJECT_NAME"], "service": service}
        filters = [f"--filter=label=com.docker.compose.{key}={it}" for key, it in labels.items()]
        (found,) = self.engine.docker("ps", "--all", "--quiet", *filters).split()
        return found

    def run(self, service: str, *words: str) -> str:
        """Run a program in a service's container."""
        __tracebackhide__ = True
        return self.engine.docker("exec", self.container(service), *words)

    def lines(self) -> list[str]:
        """Return what the application has written, as the application sees it."""
        return self.run("app-fuse", "cat", "/mnt/nbdstore/sample/log").splitlines()

    def advance(self) -> list[str]:
        """Wait until the application has written more; return all that it has written."""
        before = self.lines()
        deadline = time.monotonic() + 90
        while len(after := self.lines()) <= len(before):
            assert time.monotonic() < deadline, self.compose("logs")
            time.sleep(0.2)
        assert after[: len(before)] == before
        return after


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_what_the_sample_writes_survives(engine: Engine, tmp_path: Path, fs: str) -> None:
    mounts = tmp_path / "mounts"
    project = Project(engine, mounts, fs)
    project.compose("up", "--detach", "--build", timeout_s=600)
    first = project.advance()
    assert f" /mnt/nbdstore/sample {fs} rw" in project.run("app-fuse", "cat", "/proc/mounts")
    for service, root in (("server", False), ("app-fuse", False), ("agent-fuse", True)):
        status = project.run(service, "cat", "/proc/1/status")
        assert ("Uid:\t0\t" in status) is root, service

    # The server is killed and comes back: the application waits, and goes on without an error.
    engine.docker("kill", project.container("server"))
    engine.docker("start", project.container("server"))
    assert project.advance()[: len(first)] == first
    deadline = time.monotonic() + 60
    started = engine.inspect(project.container("app-fuse"))
    assert started["RestartCount"] == 0

    # What a relay leaves behind when it ends is nobody's child there, and still goes.
    project.run("server", "nbdstore", "volume", "create", "extra", "--size", "64M")
    project.run("agent-fuse", "nbdstore", "attach", "extra")
    project.run("agent-fuse", "nbdstore", "detach", "extra")
    while ") Z " in project.run("agent-fuse", "sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null"):
        assert time.monotonic() < deadline, "what has ended is reaped"

    # All stop in order, and start again; then all containers are removed, and made anew.
    project.compose("stop")
    assert all(
        engine.inspect(project.container(service))["State"]["ExitCode"] == 0
        for service in ("server", "agent-fuse", "app-fuse")
    )
    project.compose("start")
    second = project.advance()
    assert second[: len(first)] == first
    project.compose("down")
    assert [path.name for path in mounts.iterdir()] in ([], ["sample"])
    project.compose("up", "--detach")
    assert project.advance()[: len(second)] == second
    project.compose("down", "--volumes")


def test_the_kernel_profile_is_what_the_file_means_by_itself(
    engine: Engine, tmp_path: Path
) -> None:
    env = {"COMPOSE_PROJECT_NAME": "kernel", "NBDSTORE_MOUNTS": str(tmp_path / "mounts")}
    env["NBDSTORE_BASE"] = base_image(engine)
    engine.compose(ROOT / "docker-compose.yml", "up", "--no-start", env=env, timeout_s=600)
    label = '{{.Label "com.docker.compose.service"}}'
    services = engine.docker("ps", "--all", "--format", label).split()
    assert sorted(services) == ["agent", "app", "server"]
