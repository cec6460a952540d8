"""Ways to break nbdstore, one for each rule of the conformance client, each found by one case.

What a conformance client says is worth as much as its ability to say something else: every rule is
broken here in a server that keeps all others. The server runs in the test's process, so breaking
it means to replace a method for a while.
"""

from __future__ import annotations

import copy
import dataclasses
import ssl
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from nbdstore.errors import ProtocolError
from nbdstore.protocol import handshake, rules
from nbdstore.protocol.agreement import BASE_ALLOCATION, Agreement, OptionRefused, TlsMode
from nbdstore.protocol.constants import (
    ERROR,
    EXPORT_NAME_PADDING,
    INFO_BLOCK_SIZE,
    ClientFlag,
    Command,
    CommandFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdstore.protocol.handshake import Handshake, HandshakeLimits
from nbdstore.protocol.replies import SimpleReplies, StructuredReplies
from nbdstore.protocol.rules import Rules
from nbdstore.protocol.transmission import Request, RequestParser
from nbdstore.server import commands, connection, tls
from nbdstore.server.commands import Target
from nbdstore.server.session import Session
from nbdstore.server.tls_channel import TlsChannel
from nbdstore.store import ExtentKind
from tests.conformance.wire import Mode
from tests.server.memory_pool import MemoryVolume

Patch = pytest.MonkeyPatch


@dataclasses.dataclass(frozen=True)
class Sabotage:
    """One way to break a rule.

    Arguments:
        rule: the number of the rule.
        found_by: the case that must not pass.
        tls: the mode that the server must be in.
        modes: in which the case runs; one is enough if it takes all of its time.
        apply: breaks it.
    """

    rule: int
    found_by: str
    tls: TlsMode
    modes: Sequence[Mode]
    apply: Callable[[Patch], None]

    @property
    def name(self) -> str:
        return f"{self.rule:02} {self.apply.__name__.replace('_', ' ')}"


SABOTAGES: list[Sabotage] = []


def breaks(
    rule: int, found_by: str, tls: TlsMode = TlsMode.OFF, modes: Sequence[Mode] = tuple(Mode)
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Add a function to the list."""

    def add(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        SABOTAGES.append(Sabotage(rule, found_by, tls, modes, apply))
        return apply

    return add


def wrap(patch: Patch, owner: object, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by ``around``, which gets the original as its first argument."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


# --- Handshake -----------------------------------------------------------------------------------


@breaks(1, "option-unknown")
def data_of_unknown_options_is_left(patch: Patch) -> None:
    def handle(original: Any, self: Any, option: int, data: bytes | None) -> None:
        if option not in self._HANDLERS:
            self._received[:0] = data or b""
        original(self, option, data)

    wrap(patch, Handshake, "_handle", handle)


@breaks(2, "info-lying-lengths")
def lengths_are_not_looked_at(patch: Patch) -> None:
    patch.setattr(handshake, "parse_info", lambda data: ("disk", []))


@breaks(3, "info-export")
def export_information_only_if_asked(patch: Patch) -> None:
    def build(original: Any, offer: Any, flags: Any, asked: Any) -> list[bytes]:
        infos: list[bytes] = original(offer, flags, asked)
        return infos if Info.EXPORT in asked else infos[1:]

    wrap(patch, handshake, "build_infos", build)


@breaks(4, "info-go-same")
def info_tells_no_size(patch: Patch) -> None:
    def reply(original: Any, self: Any, option: int, kind: int, data: bytes = b"") -> None:
        if option == Option.INFO and kind == OptionReply.INFO and data[:2] == b"\0\0":
            data = data[:2] + bytes(8) + data[10:]
        original(self, option, kind, data)

    wrap(patch, Handshake, "_reply", reply)


@breaks(5, "export-name-unpadded")
def padding_for_everybody(patch: Patch) -> None:
    def export_name(original: Any, self: Any, option: int, data: bytes) -> None:
        original(self, option, data)
        if self._client_flags & ClientFlag.NO_ZEROES:
            self._replies[-1] += EXPORT_NAME_PADDING

    wrap(patch, Handshake, "_export_name", export_name)
    patch.setitem(Handshake._HANDLERS, Option.EXPORT_NAME, Handshake._export_name)


@breaks(6, "block-sizes")
def a_minimum_block_of_three(patch: Patch) -> None:
    def reply(original: Any, self: Any, option: int, kind: int, data: bytes = b"") -> None:
        if kind == OptionReply.INFO and data[:2] == b"\0\3":
            data = INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 3, 4096, 32 << 20)
        original(self, option, kind, data)

    wrap(patch, Handshake, "_reply", reply)


@breaks(7, "context-other-export")
def contexts_are_for_every_export(patch: Patch) -> None:
    def agree(original: Any, self: Any, name: str, offer: Any) -> Agreement:
        self._contexts_export = name
        agreement: Agreement = original(self, name, offer)
        return agreement

    wrap(patch, Handshake, "_agree", agree)


@breaks(8, "flags-valid")
def df_is_always_offered(patch: Patch) -> None:
    def agree(original: Any, self: Any, name: str, offer: Any) -> Agreement:
        agreement: Agreement = original(self, name, offer)
        flags = agreement.flags | TransmissionFlag.SEND_DF
        return dataclasses.replace(agreement, flags=flags)

    wrap(patch, Handshake, "_agree", agree)


@breaks(9, "reads-beyond-size")
def offsets_have_a_sign(patch: Patch) -> None:
    def judge(original: Any, self: Any, command: int, flags: int, offset: int, n: int) -> int:
        verdict: int = original(self, command, flags, offset & ((1 << 63) - 1), n)
        return verdict

    wrap(patch, Rules, "judge", judge)


@breaks(10, "options-bounded")
def options_without_end(patch: Patch) -> None:
    unlimited = HandshakeLimits(max_options=1 << 40, max_option_bytes=1 << 60)
    patch.setattr(connection, "HandshakeLimits", lambda **_: unlimited)


# --- TLS -----------------------------------------------------------------------------------------


@breaks(11, "tls-forgets", TlsMode.OPTIONAL)
def starttls_forgets_nothing(patch: Patch) -> None:
    def forget(original: Any, self: Any) -> None:
        if not hasattr(self, "_mode"):
            original(self)

    wrap(patch, Handshake, "_forget", forget)


@breaks(12, "tls-required", TlsMode.REQUIRED)
def unknown_options_do_without_tls(patch: Patch) -> None:
    def check(original: Any, self: Any, option: int) -> None:
        if option in self._HANDLERS:
            original(self, option)

    wrap(patch, Handshake, "_check_tls", check)


@breaks(13, "tls-optional", TlsMode.OPTIONAL)
def lists_want_tls(patch: Patch) -> None:
    def listing(original: Any, self: Any, option: int, data: bytes) -> None:
        if not self._tls_established:
            raise OptionRefused(OptionReply.ERR_TLS_REQD, "Use TLS.")
        original(self, option, data)

    wrap(patch, Handshake, "_list", listing)
    patch.setitem(Handshake._HANDLERS, Option.LIST, Handshake._list)


@breaks(14, "tls-goodbye", TlsMode.REQUIRED)
def no_goodbye(patch: Patch) -> None:
    patch.setattr(TlsChannel, "_say_goodbye", lambda self: None)


@breaks(14, "tls-old", TlsMode.REQUIRED)
def old_tls_is_spoken(patch: Patch) -> None:
    def make(original: Any, options: Any) -> ssl.SSLContext:
        context: ssl.SSLContext = original(options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
        context.set_ciphers("ALL:@SECLEVEL=0")
        return context

    wrap(patch, tls, "make_context", make)


@breaks(11, "tls-injected", TlsMode.REQUIRED)
def plaintext_is_taken_for_secret(patch: Patch) -> None:
    def starttls(original: Any, self: Any, option: int, data: bytes) -> None:
        sent_ahead = bytes(self._received)
        self._received.clear()
        original(self, option, data)
        self._received += sent_ahead

    wrap(patch, Handshake, "_starttls", starttls)
    patch.setitem(Handshake._HANDLERS, Option.STARTTLS, Handshake._starttls)


# --- Replies -------------------------------------------------------------------------------------


@breaks(15, "chunks-error")
def refusals_are_simple(patch: Patch) -> None:
    patch.setattr(StructuredReplies, "error", SimpleReplies.error)


@breaks(16, "read-across-end")
def refused_reads_are_zeroes(patch: Patch) -> None:
    def answer(original: Any, self: Any, request: Request, out: Any) -> int:
        command, _, cookie, offset, length, _, verdict = request
        if command == Command.READ and verdict > 0:
            n_bytes: int = self.replies.read(out, cookie, offset, length, [length])
            return n_bytes
        n_bytes = original(self, request, out)
        return n_bytes

    wrap(patch, Target, "settle", answer)


@breaks(17, "chunks-error")
def messages_are_longer_than_they_are(patch: Patch) -> None:
    def error(original: Any, self: Any, out: Any, cookie: bytes, *rest: Any) -> int:
        n_bytes: int = original(self, out, cookie, *rest)
        at = len(self._header(cookie, 0, 0, 0, 0))
        number, length = ERROR.unpack_from(out[-1], at)
        lying = ERROR.pack(number, length + 10)
        out[-1] = out[-1][:at] + lying + out[-1][at + len(lying) :]
        return n_bytes

    wrap(patch, StructuredReplies, "error", error)


@breaks(18, "chunks-read")
def the_first_sector_comes_twice(patch: Patch) -> None:
    def read(original: Any, self: Any, out: Any, cookie: bytes, offset: int, *rest: Any) -> int:
        n_bytes: int = self._data(out, cookie, offset, (offset, 512, [bytes(512)]), 0)
        return n_bytes + int(original(self, out, cookie, offset, *rest))

    wrap(patch, StructuredReplies, "read", read)


# --- Requests ------------------------------------------------------------------------------------


@breaks(19, "write-refused-consumed")
def refused_payloads_are_left(patch: Patch) -> None:
    def take(
        original: Any, self: Any, requests: Any, flags: int, command: int, cookie: bytes, *rest: Any
    ) -> bool:
        verdict = self._judge_payload(flags, command, *rest)
        if verdict <= 0:
            return bool(original(self, requests, flags, command, cookie, *rest))
        requests.append((command, flags, cookie, *rest, None, verdict))
        return True

    wrap(patch, RequestParser, "_take_payload", take)


@breaks(20, "read-empty")
def empty_requests_are_an_offence(patch: Patch) -> None:
    def judge(original: Any, self: Any, command: int, flags: int, offset: int, n: int) -> int:
        if not n and command not in (Command.FLUSH, Command.DISC):
            raise ProtocolError("a request of no bytes")
        verdict: int = original(self, command, flags, offset, n)
        return verdict

    wrap(patch, Rules, "judge", judge)


@breaks(21, "disc")
def disc_is_answered(patch: Patch) -> None:
    def run(original: Any, self: Any, requests: list[Request]) -> None:
        for request in requests:
            if request[0] == Command.DISC:
                out = self._outbox
                out.n_bytes += self._replies.done(out.buffers, request[2], request[3])
        original(self, requests)

    wrap(patch, Session, "_run", run)


@breaks(22, "multi-conn-visible")
def connections_have_caches_of_their_own(patch: Patch) -> None:
    def begin(original: Any, self: Any, channel: Any, agreement: Agreement, *rest: Any) -> None:
        offer: Any = agreement.offer
        private = copy.copy(offer.volume)
        private.blocks = dict(private.blocks)
        mine = dataclasses.replace(offer, volume=private)
        original(self, channel, dataclasses.replace(agreement, offer=mine), *rest)

    wrap(patch, Session, "__init__", begin)


@breaks(23, "fua")
def fua_is_for_writes_only(patch: Patch) -> None:
    def allowed(original: Any, agreement: Agreement) -> dict[int, int]:
        flags: dict[int, int] = original(agreement)
        for command in (Command.TRIM, Command.WRITE_ZEROES):
            flags[command] &= ~CommandFlag.FUA
        return flags

    wrap(patch, rules, "allowed_flags", allowed)


@breaks(24, "zero")
def zeroes_are_one_byte_short(patch: Patch) -> None:
    def zero(original: Any, self: Any, offset: int, length: int, **flags: bool) -> Any:
        return original(self, offset, length - 1, **flags)

    wrap(patch, MemoryVolume, "write_zeroes", zero)


@breaks(24, "trim")
def trims_reach_too_far(patch: Patch) -> None:
    def trim(original: Any, self: Any, offset: int, length: int) -> Any:
        return original(self, offset, length + 8192)

    wrap(patch, MemoryVolume, "trim", trim)


@breaks(24, "writes-in-one-block")
def small_writes_undo_each_other(patch: Patch) -> None:
    """Blocks are read before a batch and written after it, without a look at what came between."""

    def write_now(original: Any, self: Any, writes: Any, n_clients: int = 1) -> bool:
        before = {block: bytes(data) for block, data in self.blocks.items()}
        for offset, data in writes:
            block, at = divmod(offset, self.block_size)
            if at + len(data) > self.block_size:
                return bool(original(self, writes))
            old = bytearray(before.get(block, bytes(self.block_size)))
            old[at : at + len(data)] = data
            self.blocks[block] = old
        return True

    wrap(patch, MemoryVolume, "write_now", write_now)


@breaks(25, "status-written")
def data_is_told_to_be_zero(patch: Patch) -> None:
    allocation = commands._STATUS[BASE_ALLOCATION]
    patch.setitem(allocation, ExtentKind.DATA, allocation[ExtentKind.ZERO])


@breaks(25, "status-one")
def one_extent_is_never_enough(patch: Patch) -> None:
    def describe(original: Any, context: Any, extents: Any) -> Any:
        (length, status), *rest = original(context, extents)
        return [(length // 2, status), (length - length // 2, status), *rest]

    wrap(patch, commands, "describe", describe)


@breaks(26, "cookie-opaque")
def cookies_have_63_bits(patch: Patch) -> None:
    def received(original: Any, self: Any, n_bytes: int) -> list[Any]:
        return [
            (command, flags, bytes([cookie[0] & 0x7F]) + cookie[1:], *rest)
            for command, flags, cookie, *rest in original(self, n_bytes)
        ]

    wrap(patch, RequestParser, "received", received)


@breaks(27, "cache")
def cache_drops_what_it_should_fetch(patch: Patch) -> None:
    async def cache(self: Any, offset: int, length: int) -> None:
        self._write(offset, b"\xee" * length)

    patch.setattr(MemoryVolume, "cache", cache)


@breaks(28, "command-unknown-payload", modes=(Mode.SIMPLE,))
def unknown_commands_eat_what_follows(patch: Patch) -> None:
    def received(original: Any, self: Any, n_bytes: int) -> list[Request]:
        kept = []
        for request in original(self, n_bytes):
            if not getattr(self, "hungry", False):
                kept.append(request)
            self.hungry = request[0] > Command.RESIZE
        return kept

    wrap(patch, RequestParser, "received", received)


@breaks(29, "magic-unknown", modes=(Mode.SIMPLE,))
def unknown_magics_are_overlooked(patch: Patch) -> None:
    def parse(original: Any, self: Any, requests: list[Request]) -> None:
        try:
            original(self, requests)
        except ProtocolError:
            self._start = self._end

    wrap(patch, RequestParser, "_parse", parse)


@breaks(29, "read", modes=(Mode.SIMPLE,))
def every_third_request_is_forgotten(patch: Patch) -> None:
    """Nothing comes, for ever: a hang is found by the case's deadline."""
    n_requests = 0

    def received(original: Any, self: Any, n_bytes: int) -> list[Request]:
        nonlocal n_requests
        n_requests += 1
        requests: list[Request] = original(self, n_bytes)
        return requests if n_requests % 3 else []

    wrap(patch, RequestParser, "received", received)
