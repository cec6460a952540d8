"""A virtual machine whose kernel has what the host's may lack: the nbd driver and filesystems.

QEMU emulates it, so neither KVM nor privileges are needed. The guest's root is the host's, read
through 9p, under an overlay in memory: every program of the host is there, and nothing the guest
writes is kept. Emulation is slow, about a twentieth of the host's speed: made for behaviour, not
for load.
"""

from __future__ import annotations

import base64
import re
import secrets
import socket
import time
from pathlib import Path

from tests.children import Children, CommandError
from tests.closing import Closing
from tests.guest.initramfs import write_initramfs
from tests.guest.kernel import fetch_kernel

# The host's 127.0.0.1, as seen from the guest.
HOST = "10.0.2.2"
# A boot takes 5 s on an idle machine. An emulated boot that hangs does not recover: try again.
BOOT_TIMEOUTS_S = (60, 120)
COMMAND_TIMEOUT_S = 300.0
RECEIVE_BYTES = 64 << 10

KERNEL_COMMAND_LINE = (
    "console=ttyS0 loglevel=4 panic=-1 oops=panic net.ifnames=0 mitigations=off "
    # The emulated timer is late on a loaded host, and the kernel must not give up on it.
    "tsc=reliable no_timer_check nowatchdog rcupdate.rcu_cpu_stall_timeout=120"
)


class GuestError(Exception):
    """The guest did not boot, died, or did not answer in time."""


class Guest(Closing):
    """A booted guest, that runs shell scripts one after the other.

    Arguments:
        children: what QEMU is killed with, at the latest.
        directory: for the files that QEMU needs.
    """

    def __init__(
        self, children: Children, directory: Path, *, memory_mib: int = 1024, n_cpus: int = 2
    ) -> None:
        self.children = children
        self.directory = directory
        self.memory_mib = memory_mib
        self.n_cpus = n_cpus
        self.boot()

    def boot(self) -> None:
        kernel = fetch_kernel()
        initramfs = self.directory / "initramfs"
        write_initramfs(initramfs, kernel)
        for timeout_s in BOOT_TIMEOUTS_S:
            self.start(kernel.image, initramfs)
            try:
                return self.wait_until_ready(timeout_s)
            except TimeoutError:
                self.close()
        raise GuestError(f"the guest did not boot within {BOOT_TIMEOUTS_S[-1]} s")

    def start(self, image: Path, initramfs: Path) -> None:
        self.channel, theirs = socket.socketpair()
        console = self.children.log_file("guest-console.log")
        with theirs:
            self.qemu = self.children.start(
                "qemu-system-x86_64",
                *self.machine_options(),
                *("-kernel", str(image), "-initrd", str(initramfs)),
                *("-append", KERNEL_COMMAND_LINE, "-serial", "chardev:console"),
                *("-chardev", f"file,id=console,path={console},append=on"),
                *("-chardev", f"socket,id=channel,fd={theirs.fileno()}"),
                *("-device", "virtserialport,chardev=channel,nr=1"),
                log="guest-qemu.log",
                pass_fds=[theirs.fileno()],
            )

    def machine_options(self) -> list[str]:
        return [
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-accel", "tcg,thread=multi", "-cpu", "max,la57=off"),
            *("-smp", str(self.n_cpus), "-m", str(self.memory_mib)),
            *("-netdev", "user,id=net,ipv6=off", "-device", "virtio-net-pci,netdev=net,romfile="),
            *("-device", "virtio-serial-pci"),
            "-fsdev",
            "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
            *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
        ]

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait for the agent. Raises TimeoutError, or GuestError if QEMU ends."""
        self.receive_until(rb"ready\n()", timeout_s)

    def run(
        self, script: str, *, timeout_s: float = COMMAND_TIMEOUT_S, status: int | None = 0
    ) -> str:
        """Run a shell script and return what it wrote, standard output and error together.

        The script stops at the first command that fails, and is shown in the console's log.
        Raises CommandError unless it ends with ``status`` (None accepts every status), and
        GuestError if it does not end within ``timeout_s``.
        """
        __tracebackhide__ = True
        token = secrets.token_hex(16)
        encoded = base64.b64encode(f"set -e\n{script}".encode()).decode()
        self.channel.settimeout(timeout_s)
        self.channel.sendall(f"{token} {encoded}\n".encode())
        try:
            found = self.receive_until(rb"%s (\d+)\n" % token.encode(), timeout_s)
        except TimeoutError as error:
            raise GuestError(f"not done within {timeout_s} s:\n{script}\n{error}") from error
        output = found.string[: found.start()].decode(errors="replace")
        if status is not None and int(found[1]) != status:
            raise CommandError(["guest", script], int(found[1]), output)
        return output

    def receive_until(self, pattern: bytes, timeout_s: float) -> re.Match[bytes]:
        """Collect what the guest sends until it ends as ``pattern`` says.

        Raises TimeoutError with what had come by then, and GuestError if the guest is gone.
        """
        received = bytearray()
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern + rb"\Z", received)):
            self.channel.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self.channel.recv(RECEIVE_BYTES)
            except TimeoutError:
                raise TimeoutError(received.decode(errors="replace")) from None
            if not data:
                raise GuestError(f"QEMU ended with {self.qemu.wait()}: see guest-console.log")
            received += data
        return found

    def reboot(self) -> None:
        """Cut the guest's power and boot it again; nothing of what it wrote is left."""
        self.close()
        self.boot()

    def close(self) -> None:
        """Cut the guest's power."""
        self.channel.close()
        self.qemu.kill()
        self.qemu.wait()
