"""What people see: progress, log lines, addresses, tables."""

from __future__ import annotations

import io
import logging
import socket
import sys
from typing import Any

import pytest

from nbdstore.commands import announcement, logs
from nbdstore.commands.announcement import Address
from nbdstore.commands.output import counted, print_table
from nbdstore.commands.progress import Progress

MIB = 1 << 20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
    def draw(self, monkeypatch: Any, stream: io.StringIO, total: int | None) -> str:
        monkeypatch.setattr("nbdstore.commands.progress.REDRAW_EVERY_S", 0)
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("import db", total) as progress:
            progress.update(MIB)
        return stream.getvalue()

    def test_of_known_length(self, monkeypatch: Any) -> None:
        text = self.draw(monkeypatch, Terminal(), 4 * MIB)
        assert "import db  [######------------------]  25%  1 MiB of 4 MiB" in text
        assert text.endswith("\r\x1b[K")

    def test_of_unknown_length(self, monkeypatch: Any) -> None:
        assert "import db  1 MiB  " in self.draw(monkeypatch, Terminal(), None)

    def test_is_for_terminals_only(self, monkeypatch: Any) -> None:
        assert self.draw(monkeypatch, io.StringIO(), 4 * MIB) == ""


class TestLogs:
    def record(self, level: int, message: str, error: Exception | None = None) -> logging.LogRecord:
        info = (type(error), error, error.__traceback__) if error else None
        return logging.LogRecord("nbdstore", level, __file__, 1, message, None, info)

    def test_one_line_each(self) -> None:
        try:
            raise ValueError("a\nb")
        except ValueError as error:
            record = self.record(logging.ERROR, "it\nbroke", error)
        line = logs.OneLine("%(message)s").format(record)
        assert line.startswith("it | broke | ValueError: a | b at ")
        assert "\n" not in line

    @pytest.mark.parametrize(
        ("level", "prefix"),
        [
            (logging.DEBUG, "<7>"),
            (logging.INFO, "<6>"),
            (logging.WARNING, "<4>"),
            (logging.ERROR, "<3>"),
        ],
    )
    def test_priorities_for_journald(self, level: int, prefix: str) -> None:
        assert logs.JournalLine("%(message)s").format(self.record(level, "x")) == f"{prefix}x"

    def test_an_inherited_journal_stream_is_not_believed(self) -> None:
        assert not logs.to_journal({})
        assert not logs.to_journal({"JOURNAL_STREAM": "1:1"})


class TestAddresses:
    @pytest.mark.parametrize(
        ("text", "uri", "command"),
        [
            ("127.0.0.1:10809", "nbd://127.0.0.1:10809/db", "nbd-client 127.0.0.1 10809 -N db"),
            ("[::1]:10809", "nbd://[::1]:10809/db", "nbd-client ::1 10809 -N db"),
            (
                "unix:/run/my nbd.sock",
                "nbd+unix:///db?socket=/run/my%20nbd.sock",
                "nbd-client -unix '/run/my nbd.sock' -N db",
            ),
        ],
    )
    def test_what_clients_are_told(self, text: str, uri: str, command: str) -> None:
        address = Address.parse(text)
        assert address.uri("db", tls=False) == uri
        assert address.uri("db", tls=True) == uri.replace("nbd", "nbds", 1)
        assert address.nbd_client("db") == f"{command} /dev/nbd0"

    @pytest.mark.parametrize("text", ["0.0.0.0:10809", "[::]:10809"])
    def test_all_interfaces_are_the_machine_s_name(self, text: str) -> None:
        assert Address.parse(text).host == socket.gethostname()

    def test_a_pool_of_hundreds_is_not_listed_in_full(self, capsys: Any) -> None:
        class Volume:
            size = MIB

            def __init__(self, name: str) -> None:
                self.name = name

        volumes: Any = [Volume(f"v{n:03}") for n in range(300)]
        announcement.show("/pool", volumes, ["127.0.0.1:10809"], tls=True)
        text = capsys.readouterr().out
        assert "v009" in text
        assert "v010" not in text
        assert "and 290 more: 'nbdstore volume list'" in text
        assert "nbds://127.0.0.1:10809/v000" in text
        assert "-cacertfile" in text


def test_columns(capsys: Any) -> None:
    print_table(("NAME", "SIZE"), [("db", "1 GiB"), ("a-long-one", "10 GiB")], right="SIZE")
    assert capsys.readouterr().out == (
        "NAME          SIZE\ndb           1 GiB\na-long-one  10 GiB\n"
    )


def test_numbers_of_things() -> None:
    assert [counted(n, "fault") for n in range(3)] == ["0 faults", "1 fault", "2 faults"]
