"""An OpenSSH server of a test's own, on loopback, with keys of its own, for the present user only.

Owns its configuration, and a command ``ssh`` that knows it as the host ``backup``.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

from tests.children import Children
from tests.clients.served_pool import free_port

HOST = "backup"
READY_TIMEOUT_S = 30.0


class SecureShell:
    """A running sshd.

    env: what a shell needs to reach it by ``ssh backup COMMAND``, and to find ``nbdstore``.

    Arguments:
        pool: where ``nbdstore`` has its pool when it is called over ssh.
    """

    def __init__(self, children: Children, pool: Path) -> None:
        self._children = children
        self.directory = children.directory / "ssh"
        self.directory.mkdir(mode=0o700)
        self.port = free_port()
        if os.geteuid() == 0:
            # What the service of Debian's package makes at its start; sshd insists on it.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for key in ("host_key", "user_key"):
            children.run(
                *("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.directory / key)
            )
        scripts = sysconfig.get_path("scripts")
        self._write_server_config(f"{scripts}:{os.environ['PATH']}", pool)
        self._write_client()
        self.env = {"PATH": f"{self.directory}:{scripts}:{os.environ['PATH']}"}
        self._process = self._start()

    def _write_server_config(self, path: str, pool: Path) -> None:
        (self.directory / "authorized_keys").write_bytes(
            (self.directory / "user_key.pub").read_bytes()
        )
        (self.directory / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{self.port}\n"
            f"HostKey {self.directory}/host_key\n"
            f"AuthorizedKeysFile {self.directory}/authorized_keys\n"
            "AuthenticationMethods publickey\n"
            "PermitRootLogin prohibit-password\n"
            "StrictModes no\n"  # the directories above are the test's
            "UsePAM no\n"
            "PidFile none\n"
            f"SetEnv PATH={path} NBDSTORE_POOL={pool}\n"
        )

    def _write_client(self) -> None:
        kind, key, *_ = (self.directory / "host_key.pub").read_text().split()
        known = self.directory / "known_hosts"
        known.write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")
        (self.directory / "ssh_config").write_text(
            f"Host {HOST}\n"
            "  HostName 127.0.0.1\n"
            f"  Port {self.port}\n"
            f"  User {pwd.getpwuid(os.geteuid()).pw_name}\n"
            f"  IdentityFile {self.directory}/user_key\n"
            "  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {known}\n"
            "  StrictHostKeyChecking yes\n"
            "  BatchMode yes\n"
            "  LogLevel ERROR\n"
        )
        program = shlex.quote(str(shutil.which("ssh")))
        wrapper = self.directory / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {program} -F {self.directory}/ssh_config "$@"\n')
        wrapper.chmod(0o755)

    def _start(self) -> subprocess.Popen[bytes]:
        sshd = str(shutil.which("sshd"))  # it wants to be called by its whole path
        config = self.directory / "sshd_config"
        process = self._children.start(sshd, "-D", "-e", "-f", config, log="sshd.log")
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return process
            except OSError:
                assert process.poll() is None, "sshd has ended: see its log"
                assert time.monotonic() < deadline, "sshd does not listen"
                time.sleep(0.02)

    def cut_connections(self) -> None:
        """Kill the processes that serve connections; the server itself goes on."""
        pid = self._process.pid
        served = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert served, "nobody is connected"
        for child in served:
            os.kill(int(child), 9)
