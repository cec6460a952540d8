"""A pool whose control API can be reached over TCP, as guests need it."""

from __future__ import annotations

from pathlib import Path

from tests.clients.served_pool import ServedPool, free_port


class Served:
    """Serves `pool`, with `options`; `token_file` holds the token for `control_port`."""

    def __init__(self, pool: ServedPool, directory: Path, *options: str) -> None:
        self.pool = pool
        self.control_port = free_port()
        self.token_file = directory / "token"
        self.token_file.write_text("a-token-for-the-tests-alone\n")
        self.token_file.chmod(0o600)
        pool.start(
            *("--control", f"127.0.0.1:{self.control_port}"),
            *("--control-token-file", str(self.token_file)),
            *options,
        )
