"""Run in the guest: what one process can do with the kernel driver, step by step.

``python -m tests.agent.inside N_VOLUMES`` makes and attaches so many volumes, and attaches "zeroed"
and "xfs". Each step fails by an AssertionError.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbdstore.agent import devices, kernel_driver
from nbdstore.agent.driver import Health
from nbdstore.agent.kernel_driver import KernelDriver, NotTaken
from nbdstore.agent.local import LocalAgent, Setting, open_agent
from nbdstore.agent.mounts import mounted_at
from nbdstore.agent.requests import AttachRequest, MountRequest
from nbdstore.errors import Busy, DeviceError, NbdstoreError

STATE = Path("/run/inside")


@contextmanager
def agent(state: str) -> Iterator[LocalAgent]:
    setting = Setting(
        state=STATE / state,
        control_url=os.environ["NBDSTORE_SERVER"],
        token=Path(os.environ["NBDSTORE_TOKEN_FILE"]).read_text().strip(),
        nbd=os.environ["NBDSTORE_NBD"],
        request_timeout_s=5,
    )
    with open_agent(setting) as opened:
        yield opened


@contextmanager
def refused(kind: type[NbdstoreError], words: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert words in str(error), error
        return
    raise AssertionError(f"this should have been refused: {words}")


def configured() -> list[str]:
    return [device.name for device in devices.nbd_devices() if device.configured]


def more_attachments_than_devices(n_volumes: int) -> None:
    before = len(devices.nbd_devices())
    assert before < n_volumes, f"{before} devices are enough for {n_volumes} volumes"
    with agent("many") as many:
        for n in range(n_volumes):
            many.server.control.create_volume(f"small-{n}", 1 << 20)
        paths = [many.attach(AttachRequest(volume=f"small-{n}")).path for n in range(n_volumes)]
        assert len(set(paths)) == n_volumes
        assert len(configured()) == n_volumes
        for n, path in enumerate(paths):
            with Path(path).open("r+b") as file:
                file.write(b"%4d" % n)
        assert [status.state for status in many.status()] == ["attached"] * n_volumes
        assert many.examine() == []
        for n, path in enumerate(paths):
            assert Path(path).read_bytes()[:4] == b"%4d" % n
            many.detach(f"small-{n}")
        assert configured() == []
        assert many.server.leases() == []


def a_connection_is_only_taken_for_a_dead_one() -> None:
    with agent("one") as one:
        one.attach(AttachRequest(volume="small-0"))
        attachment = one.attachments.find("small-0")
        driver, device = one.drivers["kernel"], attachment.device
        assert isinstance(driver, KernelDriver) and device is not None
        with refused(NotTaken, "has not noticed"):
            driver._offer(attachment.record, device)
        assert driver.health(attachment.record, device) is Health.CONNECTED
        with refused(DeviceError, "does not reconnect"):
            other = dataclasses.replace(attachment.record, id="0" * 16)
            driver._offer(other, device)
        one.server.end_connections("small-0", attachment.record.epoch)
        while driver.health(attachment.record, device) is Health.CONNECTED:
            time.sleep(0.01)
        one.tend("small-0")
        assert driver.health(one.attachments.find("small-0").record, device) is Health.CONNECTED
        assert Path(device.path).read_bytes()[:4] == b"   0"


def devices_of_nobody_are_found() -> None:
    with agent("one") as one:
        (record,) = [item.record for item in one.attachments.all()]
        text = (path := STATE / "one" / "attachments" / f"{record.id}.json").read_text()
        path.unlink()
    with agent("other") as other:
        assert [finding.kind for finding in other.examine(fix=True)] == ["foreign-device"]
    assert configured() == ["nbd0"]
    with agent("one") as one:
        assert sorted(finding.kind for finding in one.examine()) == [
            "orphan-device",
            "orphan-lease",
        ]
        path.write_text(text)
    with agent("one") as one:
        assert one.examine() == []
        path.unlink()
    with agent("one") as one:
        findings = one.examine(fix=True)
        assert all(finding.fixed for finding in findings), findings
        assert (configured(), one.server.leases()) == ([], [])


def a_mount_that_the_agent_does_not_see_holds_the_device() -> None:
    where = "/run/elsewhere"
    with agent("one") as one:
        one.mount(MountRequest(volume="xfs", path="/run/here", filesystem="xfs"))
        device = one.attach(AttachRequest(volume="xfs")).path
        script = f"mount {device} {where} && echo mounted && exec sleep 1000"
        Path(where).mkdir()
        holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            stdout=subprocess.PIPE,
        )
        assert holder.stdout and holder.stdout.readline() == b"mounted\n"
        with refused(Busy, "is mounted at /run/here"):
            one.detach("xfs")
        one.umount("xfs")
        assert mounted_at("/run/here") is None and mounted_at(where) is None
        with refused(Busy, "in use"):
            one.detach("xfs")
        holder.kill()
        holder.wait()
        one.detach("xfs")
    assert configured() == []


def an_xfs_grows_while_it_is_mounted() -> None:
    with agent("one") as one:
        one.mount(MountRequest(volume="xfs", path="/run/here"))
        before = os.statvfs("/run/here").f_blocks
        size = one.server.control.update_volume("xfs", size=400 << 20).size
        one.grow("xfs", size)
        found = os.statvfs("/run/here")
        assert found.f_blocks > before
        assert found.f_blocks * found.f_frsize > 320 << 20, "less its log"
        one.umount("xfs")


def a_volume_with_zeroed_first_blocks_is_not_formatted() -> None:
    with agent("one") as one:
        with refused(DeviceError, "was written before, but holds neither ext4 nor xfs"):
            one.mount(MountRequest(volume="zeroed", path="/run/here"))
        assert one.status() == []
        path = one.attach(AttachRequest(volume="zeroed", read_only=True)).path
        with Path(path).open("rb") as file:
            assert file.read(4) == bytes(4)
            file.seek(5 << 20)
            assert file.read(8) == b"precious"
        one.detach("zeroed")


def main() -> None:
    assert kernel_driver.why_unavailable() is None
    more_attachments_than_devices(int(sys.argv[1]))
    a_connection_is_only_taken_for_a_dead_one()
    devices_of_nobody_are_found()
    a_mount_that_the_agent_does_not_see_holds_the_device()
    an_xfs_grows_while_it_is_mounted()
    a_volume_with_zeroed_first_blocks_is_not_formatted()
    print("all steps done")


if __name__ == "__main__":
    main()
