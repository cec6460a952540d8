"""The corpus, replayed; programs at random; and parsers that are broken on purpose are found out.

Needs no fuzzer: this part runs wherever Python does, and the same way every time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from nbdstore.errors import ProtocolError
from nbdstore.protocol import handshake
from nbdstore.protocol.agreement import TlsMode
from nbdstore.protocol.client import ClientTransmission
from nbdstore.protocol.constants import Option
from nbdstore.protocol.handshake import Handshake
from nbdstore.protocol.replies import SimpleReplies
from nbdstore.protocol.rules import Rules
from nbdstore.protocol.transmission import RequestParser
from nbdstore.server.budget import Budget
from nbdstore.server.commands import Target
from nbdstore.server.session import Session
from tests.figures import Tell
from tests.fuzz import sessions
from tests.fuzz.cutting import WAYS, cut
from tests.fuzz.program import Program
from tests.fuzz.targets import CORPUS, TARGETS, corpus_of
from tests.server.memory_pool import MemoryVolume

N_RANDOM_PROGRAMS = 300
MAX_CORPUS_BYTES = 64 << 10

pytestmark = pytest.mark.filterwarnings("error")


def run_corpus(target: str) -> None:
    """Run all inputs that are kept for a target; the exception names the one that failed."""
    for data in corpus_of(target):
        try:
            TARGETS[target](data)
        except Exception as fault:
            fault.add_note(f"{target}: {data.hex()}")
            raise


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_holds(tell: Tell, target: str) -> None:
    assert len(corpus_of(target)) > 50
    run_corpus(target)
    tell("fuzz", {"inputs": len(corpus_of(target))})


@pytest.mark.parametrize("target", TARGETS)
def test_programs_at_random_hold(tell: Tell, target: str) -> None:
    for seed in range(N_RANDOM_PROGRAMS):
        chance = Random(seed)
        data = chance.randbytes(chance.choice((5, 20, 60, 200, 500)))
        try:
            TARGETS[target](data)
        except Exception as fault:
            fault.add_note(f"{target}: {data.hex()}")
            raise
    tell("fuzz", {"inputs": N_RANDOM_PROGRAMS})


def test_the_corpus_is_small() -> None:
    assert {path.stem.removesuffix("-kept") for path in CORPUS.iterdir()} == set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) < MAX_CORPUS_BYTES


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost_by_cutting(way: str) -> None:
    stream = Random(1).randbytes(5000)
    assert b"".join(cut(stream, way)) == stream
    assert list(cut(b"", way)) == []


def test_a_program_that_is_cut_reads_zeroes() -> None:
    program = Program(b"\x03ab")
    assert program.text() == b"ab"
    assert not program
    assert (program.byte(), program.number(64), program.choose("xyz")) == (0, 0, "x")


# --- What is broken is found ---------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def wrapped(patch: Patch, owner: object, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


def options_are_kept_though_they_are_too_long(patch: Patch) -> None:
    def take(original: Any, self: Any) -> bool:
        self._limits = dataclasses.replace(self._limits, max_option_length=1 << 20)
        return bool(original(self))

    wrapped(patch, Handshake, "_take_option", take)


def tls_is_not_asked_for_by_go(patch: Patch) -> None:
    def check(original: Any, self: Any, option: int) -> None:
        if option != Option.GO:
            original(self, option)

    wrapped(patch, Handshake, "_check_tls", check)


def errors_end_without_a_full_stop(patch: Patch) -> None:
    wrapped(patch, handshake, "build_error", lambda original, *args: original(*args)[:-1] + b"!")


def a_handshake_goes_on_after_abort(patch: Patch) -> None:
    def close(original: Any, self: Any, reason: str) -> None:
        original(self, reason)
        self.phase = handshake.Phase.CLIENT_FLAGS

    wrapped(patch, Handshake, "_close", close)


def reads_may_end_one_byte_behind_the_export(patch: Patch) -> None:
    def init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._readable_size += 1

    wrapped(patch, RequestParser, "__init__", init)


def payloads_do_not_outlive_the_batch(patch: Patch) -> None:
    def received(original: Any, self: Any, n_bytes: int) -> Any:
        requests = original(self, n_bytes)
        for request in requests[1:]:
            if request[5] is not None and len(request[5]):
                request[5][0] ^= 1
        return requests

    wrapped(patch, RequestParser, "received", received)


def refused_payloads_are_parsed(patch: Patch) -> None:
    def skip(original: Any, self: Any, requests: Any) -> bool:
        self._left_to_skip = 0
        return bool(original(self, requests))

    wrapped(patch, RequestParser, "_skip", skip)


def filters_may_name_a_context_twice(patch: Patch) -> None:
    def complete(original: Any, self: Any, request: Any, payload: Any) -> Any:
        made = original(self, request, payload)
        return (*made[:6], 0) if made[0] == 7 and made[6] > 0 else made

    wrapped(patch, RequestParser, "_complete", complete)


def the_client_takes_content_twice(patch: Patch) -> None:
    def take(original: Any, self: Any, pending: Any, *args: Any) -> None:
        pending.covered.clear()
        original(self, pending, *args)

    wrapped(patch, ClientTransmission, "_take_content", take)


def the_client_trusts_lengths(patch: Patch) -> None:
    def take(original: Any, self: Any, pending: Any, chunk: int, payload: bytes) -> None:
        original(self, pending, chunk, payload[:-1] if len(payload) > 8 else payload)

    wrapped(patch, ClientTransmission, "_take_error", take)


def one_reply_is_lost(patch: Patch) -> None:
    def read(original: Any, self: Any, out: Any, cookie: bytes, *args: Any) -> int:
        return 0 if cookie.endswith(b"\x02") else int(original(self, out, cookie, *args))

    wrapped(patch, SimpleReplies, "read", read)


def one_reply_comes_twice(patch: Patch) -> None:
    def done(original: Any, self: Any, *args: Any) -> int:
        return int(original(self, *args)) + int(original(self, *args))

    wrapped(patch, SimpleReplies, "done", done)


def zeroes_are_one_byte_short(patch: Patch) -> None:
    def zero(original: Any, self: Any, offset: int, length: int, **flags: bool) -> Any:
        return original(self, offset, length - 1, **flags)

    wrapped(patch, MemoryVolume, "write_zeroes", zero)


def a_bug_of_the_server_is_only_logged(patch: Patch) -> None:
    def answer(original: Any, self: Any, *args: Any) -> int:
        raise ZeroDivisionError("a bug")

    wrapped(patch, Target, "settle", answer)


def what_is_begun_goes_on_after_the_end(patch: Patch) -> None:
    """Tasks of a client that is gone are left alone."""

    async def serve(self: Any, first_bytes: bytes) -> None:
        self._guard(self._take_first, first_bytes)
        await self._done

    def lose(original: Any, self: Any, fault: Exception) -> None:
        original(self, fault)
        self._done.done() or self._done.set_result(None)

    patch.setattr(Session, "_cancel_tasks", lambda self: None)
    patch.setattr(Session, "serve", serve)
    wrapped(patch, Session, "lose", lose)


def a_client_that_left_is_not_noticed(patch: Patch) -> None:
    patch.setattr(Session, "notice_hang_up", lambda self: None)


def memory_is_not_given_back(patch: Patch) -> None:
    def freed(original: Any, self: Any, n_bytes: int) -> None:
        original(self, n_bytes - (n_bytes > 8192))

    wrapped(patch, Budget, "freed", freed)


def the_rules_know_an_error_that_nbd_does_not(patch: Patch) -> None:
    def judge(original: Any, self: Any, *args: int) -> int:
        verdict = int(original(self, *args))
        return 33 if verdict == 28 else verdict

    wrapped(patch, Rules, "judge", judge)


BROKEN = [
    ("options", options_are_kept_though_they_are_too_long),
    ("options", tls_is_not_asked_for_by_go),
    ("options", errors_end_without_a_full_stop),
    ("options", a_handshake_goes_on_after_abort),
    ("requests", reads_may_end_one_byte_behind_the_export),
    ("requests", payloads_do_not_outlive_the_batch),
    ("requests", refused_payloads_are_parsed),
    ("requests", filters_may_name_a_context_twice),
    ("requests", the_rules_know_an_error_that_nbd_does_not),
    ("replies", the_client_takes_content_twice),
    ("replies", the_client_trusts_lengths),
    ("sessions", one_reply_is_lost),
    ("sessions", one_reply_comes_twice),
    ("sessions", zeroes_are_one_byte_short),
    ("sessions", what_is_begun_goes_on_after_the_end),
    ("sessions", a_client_that_left_is_not_noticed),
    ("sessions", memory_is_not_given_back),
    ("sessions", a_bug_of_the_server_is_only_logged),
]


@pytest.mark.parametrize(("target", "break_it"), BROKEN, ids=[b.__name__ for _, b in BROKEN])
def test_what_is_broken_is_found_by_the_corpus(
    target: str, break_it: Callable[[Patch], None], monkeypatch: Patch, tell: Tell
) -> None:
    break_it(monkeypatch)
    monkeypatch.setattr(sessions, "DEADLINE_S", 3.0)
    with pytest.raises((AssertionError, TimeoutError, ProtocolError)):
        run_corpus(target)
    tell("fuzz", {"broken parsers and servers found out": 1})


def test_every_mode_of_tls_is_in_the_corpus() -> None:
    modes = tuple(TlsMode)
    assert {Program(data).choose(modes) for data in corpus_of("options")} == set(modes)
