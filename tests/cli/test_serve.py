"""``nbdstore serve`` as a process: ready, served, stopped; started by systemd and by inetd."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdstore import unix_socket
from nbdstore.control.client import ControlClient
from nbdstore.store import Pool
from nbdstore.store.local_host import LocalDisk
from tests.clients.certificates import Authority
from tests.clients.served_pool import free_port

NBDSTORE = (sys.executable, "-m", "nbdstore")
TIMEOUT_S = 60
AS_SYSTEMD = """\
import os, sys
for fd, copy in enumerate(sys.argv[1].split(","), 3):
    os.dup2(int(copy), fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""
GREETING = b"NBDMAGICIHAVEOPT"


class Serving:
    """A server process on a pool of its own, whose readiness is waited for."""

    def __init__(self, directory: Path) -> None:
        self.pool = directory / "pool"
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify_address = str(directory / "notify")
        self.process: subprocess.Popen[str] | None = None
        self.output = ""
        self.log = ""

    def start(
        self,
        *options: str,
        environ: dict[str, str] | None = None,
        passed: Sequence[socket.socket] = (),
        stdin: Any = subprocess.DEVNULL,
    ) -> subprocess.Popen[str]:
        """Start to serve without waiting."""
        words = [*NBDSTORE, "--pool", str(self.pool), "serve", *options]
        # Descriptors that cannot be 3 or 4 already, so that these can be taken for them.
        copies = [fcntl.fcntl(sock, fcntl.F_DUPFD, 20) for sock in passed]
        if passed:
            words = [sys.executable, "-c", AS_SYSTEMD, ",".join(map(str, copies)), *words]
        self.process = subprocess.Popen(
            words,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NOTIFY_SOCKET": self.notify_address, **(environ or {})},
            pass_fds=copies,
        )
        for copy in copies:
            os.close(copy)
        return self.process

    def ready(self, *options: str, **how: Any) -> None:
        """Start to serve and return when the server says that it is ready."""
        self.notify.bind(self.notify_address.replace("@", "\0", 1))
        process = self.start(*options, **how)
        ended = os.pidfd_open(process.pid)
        readable, _, _ = select.select([self.notify, ended], [], [], TIMEOUT_S)
        os.close(ended)
        assert self.notify in readable, self.end()
        assert self.notify.recv(100) == b"READY=1"

    def end(self, *signals: signal.Signals) -> int:
        """Send signals, wait for the end, keep what was printed; return the status."""
        assert self.process is not None
        for number in signals:
            self.process.send_signal(number)
        output, log = self.process.communicate(timeout=TIMEOUT_S)
        self.output += output
        self.log += log
        assert "Traceback" not in self.log, self.log
        return self.process.returncode

    @property
    def client(self) -> ControlClient:
        return ControlClient(f"unix:{self.pool / 'control.sock'}")

    def unix_address(self) -> Path:
        """Return the path of the NBD socket that tests listen on."""
        return self.pool.with_name("nbd.sock")

    def forget(self) -> None:
        """Prepare for another start."""
        self.notify.close()
        Path(self.notify_address).unlink()
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        self.notify.close()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    """A fresh pool, and the server that is to be started on it."""
    server = Serving(tmp_path)
    Pool.create(server.pool, capacity=1 << 30, journal_size=1 << 20)
    yield server
    server.close()


def greeting_of(sock: socket.socket) -> bytes:
    with sock:
        sock.settimeout(TIMEOUT_S)
        return sock.recv(len(GREETING), socket.MSG_WAITALL)


class TestALife:
    def test_from_start_to_stop(self, serving: Serving) -> None:
        path = serving.unix_address()
        serving.ready("--listen", f"unix:{path}", "--listen", "127.0.0.1:0")
        assert greeting_of(unix_socket.connect(path)) == GREETING
        info = serving.client.pool()
        assert info.server is not None
        host, port = info.server.addresses[1].split(":")
        assert greeting_of(socket.create_connection((host, int(port)))) == GREETING
        serving.client.create_volume("db", 1 << 20)
        assert serving.process is not None
        assert (info.server.pid, info.directory) == (serving.process.pid, str(serving.pool))
        assert serving.end(signal.SIGTERM) == 0
        assert serving.notify.recv(100) == b"STOPPING=1"
        assert "stopped; everything that was acknowledged is on disk" in serving.log
        assert not (serving.pool / "control.sock").exists()
        assert not path.exists()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
    def test_other_signals_that_stop(self, serving: Serving, number: signal.Signals) -> None:
        serving.ready("--listen", "127.0.0.1:0")
        assert serving.end(number) == 0

    def test_as_many_files_as_the_hard_limit_allows(self, serving: Serving) -> None:
        few = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, few[1]))  # the server inherits it
        try:
            serving.ready("--listen", "127.0.0.1:0")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, few)
        assert serving.process is not None
        soft, hard = resource.prlimit(serving.process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard == few[1]

    def test_a_second_signal_does_not_wait_for_clients(self, serving: Serving) -> None:
        path = serving.unix_address()
        serving.ready("--listen", f"unix:{path}")
        with unix_socket.connect(path, TIMEOUT_S) as client:
            assert client.recv(len(GREETING), socket.MSG_WAITALL) == GREETING
            assert serving.end(signal.SIGTERM, signal.SIGTERM) == 0
        assert "stopped; everything that was acknowledged is on disk" in serving.log

    def test_after_a_kill_the_next_one_serves(self, serving: Serving) -> None:
        serving.ready("--listen", "127.0.0.1:0")
        serving.client.create_volume("db", 1 << 20)
        serving.end(signal.SIGKILL)
        assert (serving.pool / "control.sock").exists()
        serving.forget()
        serving.ready("--listen", "127.0.0.1:0")
        assert [volume.name for volume in serving.client.volumes()] == ["db"]

    def test_a_pool_that_a_command_has_open_is_waited_for(self, serving: Serving) -> None:
        disk = LocalDisk(serving.pool)
        disk.lock()
        process = serving.start("--listen", "127.0.0.1:0")
        assert process.stderr is not None
        assert "waiting until it is let go" in process.stderr.readline()
        disk.close()
        while "serving on" not in process.stderr.readline():
            assert process.poll() is None
        assert serving.end(signal.SIGTERM) == 0

    def test_demo_makes_what_is_missing_and_nothing_more(self, serving: Serving) -> None:
        serving.pool = serving.pool.with_name("another")
        serving.ready("--demo", "--listen", "127.0.0.1:0")
        assert [volume.name for volume in serving.client.volumes()] == ["demo"]
        serving.client.update_volume("demo", new_name="mine")
        serving.end(signal.SIGTERM)
        serving.forget()
        serving.ready("--demo", "--listen", "127.0.0.1:0")
        assert [volume.name for volume in serving.client.volumes()] == ["mine"]
        serving.end(signal.SIGTERM)

    def test_create_makes_a_pool_where_there_is_none(self, serving: Serving) -> None:
        serving.pool = serving.pool.with_name("another")
        for _ in range(2):
            serving.ready("--create", "--listen", "127.0.0.1:0")
            assert serving.client.volumes() == []
            serving.end(signal.SIGTERM)
            serving.forget()

    def test_what_it_says_when_it_is_ready(self, serving: Serving) -> None:
        path = serving.unix_address()
        serving.ready("--demo", "--listen", f"unix:{path}")
        serving.end(signal.SIGTERM)
        assert f"nbd+unix:///demo?socket={path}" in serving.output
        assert f"nbd-client -unix {path} -N demo /dev/nbd0" in serving.output
        assert "nbdinfo 'nbd+unix:///demo?socket=" in serving.output
        assert "qemu-img info 'nbd+unix:///demo?socket=" in serving.output

    def test_the_control_api_over_tcp(self, serving: Serving, tmp_path: Path) -> None:
        token_file = tmp_path / "token"
        token_file.write_text("s3cret\n")
        token_file.chmod(0o600)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        control = f"127.0.0.1:{port}"
        serving.ready(
            *("--listen", "127.0.0.1:0", "--control", control),
            *("--control-token-file", str(token_file)),
        )
        client = ControlClient(f"http://{control}", token="s3cret")
        assert client.pool().directory == str(serving.pool)
        serving.end(signal.SIGTERM)

    def test_the_control_api_over_tls(self, serving: Serving, tmp_path: Path) -> None:
        """A whole life: a token that may look, one that is withdrawn, through the command line."""
        authority = Authority(tmp_path / "ca")
        issued = authority.issue_server()
        tokens = tmp_path / "tokens"
        tokens.touch(0o600)
        tokens.write_text("admin s3cret alice\nread 0nlyl00k\n")
        control = f"127.0.0.1:{free_port()}"
        serving.ready(
            *("--listen", "127.0.0.1:0", "--control", control),
            *("--control-token-file", str(tokens)),
            *("--control-tls-cert", str(issued.certificate)),
            *("--control-tls-key", str(issued.key)),
        )
        mine = tmp_path / "mine"

        def nbdstore(token: str, *words: str) -> subprocess.CompletedProcess[str]:
            mine.write_text(token)
            server = ["--server", f"https://{control}", "--tls-ca", str(authority.certificate)]
            command = [*NBDSTORE, *server, "--token-file", str(mine), *words]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        create = ("volume", "create", "db", "--size", "1M")
        assert "may only look" in nbdstore("0nlyl00k", *create).stderr
        assert nbdstore("s3cret", *create).stdout == "created volume db, 1 MiB\n"
        assert "db" in nbdstore("0nlyl00k", "volume", "list").stdout
        tokens.write_text("admin s3cret alice\n")
        assert "token for this control address is wrong" in nbdstore("0nlyl00k", "ps").stderr
        assert serving.end(signal.SIGTERM) == 0
        assert "in the clear" not in serving.log


class TestSystemd:
    def test_readiness_at_an_abstract_address(self, serving: Serving) -> None:
        serving.notify_address = f"@nbdstore-test-{os.getpid()}"
        serving.ready("--listen", "127.0.0.1:0")
        assert serving.end(signal.SIGTERM) == 0

    def test_sockets_are_taken_over(self, serving: Serving) -> None:
        control = serving.pool.with_name("other-control.sock")
        with socket.create_server(("127.0.0.1", 0)) as nbd, unix_socket.listen(control) as api:
            serving.ready(
                passed=(nbd, api),
                environ={"LISTEN_FDS": "2", "LISTEN_FDNAMES": "nbd:control"},
            )
            assert greeting_of(socket.create_connection(nbd.getsockname())) == GREETING
            assert ControlClient(f"unix:{control}").pool().directory == str(serving.pool)
            assert serving.end(signal.SIGTERM) == 0

    def test_a_control_socket_over_tcp_has_a_token(self, serving: Serving) -> None:
        token_file = serving.pool.with_name("token")
        token_file.write_text("s3cret\n")
        token_file.chmod(0o600)
        with socket.create_server(("127.0.0.1", 0)) as api:
            serving.ready(
                *("--listen", "127.0.0.1:0", "--control-token-file", str(token_file)),
                passed=[api],
                environ={"LISTEN_FDS": "1", "LISTEN_FDNAMES": "control"},
            )
            url = f"http://127.0.0.1:{api.getsockname()[1]}"
            assert ControlClient(url, token="s3cret").pool().directory == str(serving.pool)
            assert serving.end(signal.SIGTERM) == 0

    def test_a_connection_is_served_until_it_ends(self, serving: Serving) -> None:
        ours, theirs = socket.socketpair()
        serving.ready(passed=[theirs], environ={"LISTEN_FDS": "1"})
        theirs.close()
        assert greeting_of(ours) == GREETING
        assert serving.end() == 0


class TestInetd:
    def test_the_client_on_standard_input(self, serving: Serving) -> None:
        ours, theirs = socket.socketpair()
        serving.ready("--stdin", stdin=theirs)
        theirs.close()
        assert greeting_of(ours) == GREETING
        assert serving.end() == 0
        assert serving.output == ""

    def test_nothing_but_nbd_reaches_the_client(self, serving: Serving) -> None:
        """As inetd does it: descriptors 0, 1 and 2 are all the client."""
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            [*NBDSTORE, "--pool", str(serving.pool), "serve", "--stdin"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        theirs.close()
        with ours:
            ours.settimeout(TIMEOUT_S)
            assert ours.recv(18, socket.MSG_WAITALL)[:16] == GREETING
            ours.shutdown(socket.SHUT_WR)
            assert ours.recv(1000) == b""
        assert process.wait(TIMEOUT_S) == 0


class TestStartsThatFail:
    def fails(self, serving: Serving, *options: str, status: int = 1) -> str:
        """Start a server that must fail with `status`; return its log's last line."""
        process = serving.start(*options)
        _, log = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == status, log
        assert "Traceback" not in log
        line = log.splitlines()[-1]
        assert line.startswith("nbdstore: ")
        return str(line)

    def test_a_port_in_use(self, serving: Serving) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            line = self.fails(serving, "--listen", f"127.0.0.1:{port}")
        assert f"port {port} on 127.0.0.1 is in use" in line
        assert not (serving.pool / "control.sock").exists()

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            pytest.param(lambda pool: pool.rename(pool.with_name("gone")), "no pool", id="missing"),
            pytest.param(lambda pool: (pool / "super").write_bytes(b"x" * 8192), "", id="damaged"),
            pytest.param(lambda pool: os.truncate(pool / "super", 100), "", id="truncated"),
        ],
    )
    def test_pools_that_cannot_be_served(
        self, serving: Serving, make: Callable[[Path], None], message: str
    ) -> None:
        make(serving.pool)
        assert message in self.fails(serving, "--listen", "127.0.0.1:0")

    def test_a_pool_that_is_served_already(self, serving: Serving, tmp_path: Path) -> None:
        serving.ready("--listen", "127.0.0.1:0")
        second = subprocess.run(
            [*NBDSTORE, "--pool", str(serving.pool), "serve"],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        assert second.returncode == 1
        assert second.stderr.count("\n") == 1
        assert str(serving.pool) in second.stderr
        assert serving.client.pool()
        assert serving.end(signal.SIGTERM) == 0

    def test_a_certificate_that_is_none(self, serving: Serving, tmp_path: Path) -> None:
        paths = {name: tmp_path / name for name in ("cert", "key")}
        for path in paths.values():
            path.write_text("not a certificate")
        line = self.fails(
            serving,
            *("--tls", "required", "--tls-cert", str(paths["cert"])),
            *("--tls-key", str(paths["key"]), "--listen", "127.0.0.1:0"),
        )
        assert f"cannot use the TLS certificate {paths['cert']}" in line

    def test_tokens_that_everybody_may_read(self, serving: Serving, tmp_path: Path) -> None:
        tokens = tmp_path / "tokens"
        tokens.touch(0o644)
        tokens.write_text("s3cret\n")
        line = self.fails(
            serving,
            *("--listen", "127.0.0.1:0", "--control", "127.0.0.1:0"),
            *("--control-token-file", str(tokens)),
            status=2,
        )
        assert f"chmod 600 {tokens}" in line

    def test_control_at_a_port_in_use(self, serving: Serving, tmp_path: Path) -> None:
        token_file = tmp_path / "token"
        token_file.write_text("s3cret\n")
        token_file.chmod(0o600)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            control = f"127.0.0.1:{taken.getsockname()[1]}"
            line = self.fails(
                serving,
                *("--listen", "127.0.0.1:0", "--control", control),
                *("--control-token-file", str(token_file)),
            )
        assert f"the control API cannot listen on {control}: address already in use" in line


def test_logs_for_journald(serving: Serving, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with path.open("wb") as journal:
        info = os.fstat(journal.fileno())
        serving.notify.bind(serving.notify_address)
        process = subprocess.Popen(
            [*NBDSTORE, "--pool", str(serving.pool), "serve", "--listen", "127.0.0.1:0"],
            stdout=subprocess.DEVNULL,
            stderr=journal,
            env={
                **os.environ,
                "NOTIFY_SOCKET": serving.notify_address,
                "JOURNAL_STREAM": f"{info.st_dev}:{info.st_ino}",
            },
        )
        serving.notify.settimeout(TIMEOUT_S)
        assert serving.notify.recv(100) == b"READY=1"
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
    lines = path.read_text().splitlines()
    assert lines
    assert all(line.startswith("<6>") for line in lines), lines


def test_the_listing_is_json_all_the_way(serving: Serving) -> None:
    """What the API says and what --json prints is one and the same."""
    serving.ready("--listen", "127.0.0.1:0")
    serving.client.create_volume("db", 1 << 20)
    done = subprocess.run(
        [*NBDSTORE, "--pool", str(serving.pool), "volume", "list", "--json"],
        capture_output=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    assert json.loads(done.stdout) == [volume.to_json() for volume in serving.client.volumes()]
    serving.end(signal.SIGTERM)
