"""The table of verdicts (proto.md, "Request types" and "Error values"), row by row."""

import pytest

from nbdstore.protocol.agreement import CONTEXTS, Agreement, Offer, ReplyMode
from nbdstore.protocol.constants import Command, CommandFlag, Errno, TransmissionFlag
from nbdstore.protocol.rules import ALLOWED, NOTHING_TO_DO, Rules
from tests.protocol.conversation import FLAGS

SIZE = 1 << 40
MAX = 32 << 20
BOTH = CONTEXTS
READ_ONLY = (
    TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.SEND_FUA
) & ~TransmissionFlag.SEND_TRIM


def rules(mode=ReplyMode.SIMPLE, flags=FLAGS, contexts=(), minimum_block=1, size=SIZE):
    if mode is not ReplyMode.SIMPLE:
        flags |= TransmissionFlag.SEND_DF
    if mode is ReplyMode.EXTENDED and contexts:
        flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    offer = Offer("disk", size, flags, minimum_block=minimum_block)
    return Rules(Agreement(offer, flags, mode, contexts))


@pytest.mark.parametrize(
    "command", [Command.READ, Command.WRITE, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES]
)
class TestRanges:
    def beyond(self, command):
        return Errno.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else Errno.EINVAL

    def test_to_the_last_byte(self, command):
        assert rules().judge(command, 0, SIZE - 4096, 4096) == ALLOWED

    def test_single_bytes(self, command):
        assert rules().judge(command, 0, SIZE - 1, 1) == ALLOWED

    @pytest.mark.parametrize(
        ("offset", "length"),
        [(SIZE - 4096, 4097), (SIZE, 1), ((1 << 64) - 1, 1), (0, SIZE + 1), (SIZE + 1, 0)],
    )
    def test_beyond_the_end(self, command, offset, length):
        assert rules().judge(command, 0, offset, length) == self.beyond(command)

    @pytest.mark.parametrize("offset", [0, 1, SIZE])
    def test_no_bytes_are_nothing_to_do(self, command, offset):
        assert rules().judge(command, 0, offset, 0) == NOTHING_TO_DO

    def test_misaligned(self, command):
        strict = rules(minimum_block=512)
        assert strict.judge(command, 0, 512, 1024) == ALLOWED
        assert strict.judge(command, 0, 511, 1024) == Errno.EINVAL
        assert strict.judge(command, 0, 512, 1023) == Errno.EINVAL

    def test_read_only_comes_before_the_range(self, command):
        verdict = rules(flags=READ_ONLY).judge(command, 0, SIZE, 1)
        assert verdict == (
            Errno.EINVAL if command in (Command.READ, Command.CACHE) else Errno.EPERM
        )


@pytest.mark.parametrize("mode", ReplyMode)
@pytest.mark.parametrize(
    "command",
    [Command.READ, Command.WRITE, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, Command.FLUSH],
)
def test_fua_is_accepted_on_every_command(mode, command):
    length = 0 if command == Command.FLUSH else 512
    assert rules(mode).judge(command, CommandFlag.FUA, 0, length) == ALLOWED
    without = rules(mode, FLAGS & ~TransmissionFlag.SEND_FUA)
    assert without.judge(command, CommandFlag.FUA, 0, length) == Errno.EINVAL


@pytest.mark.parametrize(
    ("mode", "command", "flags", "verdict"),
    [
        (ReplyMode.SIMPLE, Command.READ, CommandFlag.DF, Errno.EINVAL),
        (ReplyMode.STRUCTURED, Command.READ, CommandFlag.DF, ALLOWED),
        (ReplyMode.EXTENDED, Command.READ, CommandFlag.DF, ALLOWED),
        (
            ReplyMode.SIMPLE,
            Command.WRITE_ZEROES,
            CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO | CommandFlag.FUA,
            ALLOWED,
        ),
        (ReplyMode.SIMPLE, Command.WRITE, CommandFlag.NO_HOLE, Errno.EINVAL),
        (ReplyMode.SIMPLE, Command.WRITE, CommandFlag.PAYLOAD_LEN, Errno.EINVAL),
        (ReplyMode.EXTENDED, Command.WRITE, CommandFlag.PAYLOAD_LEN, ALLOWED),
        (ReplyMode.EXTENDED, Command.READ, CommandFlag.PAYLOAD_LEN, Errno.EINVAL),
        (ReplyMode.SIMPLE, Command.TRIM, CommandFlag.NO_HOLE, Errno.EINVAL),
        (ReplyMode.SIMPLE, Command.CACHE, CommandFlag.REQ_ONE, Errno.EINVAL),
        (ReplyMode.SIMPLE, Command.READ, 1 << 6, Errno.EINVAL),
        (ReplyMode.SIMPLE, Command.READ, 1 << 15, Errno.EINVAL),
        (ReplyMode.SIMPLE, Command.DISC, 1 << 15, ALLOWED),
        (ReplyMode.SIMPLE, Command.RESIZE, 0, Errno.EINVAL),
        (ReplyMode.SIMPLE, 9, 0, Errno.EINVAL),
        (ReplyMode.SIMPLE, 0xFFFF, 0, Errno.EINVAL),
    ],
)
def test_flags_and_commands(mode, command, flags, verdict):
    assert rules(mode).judge(command, flags, 0, 4096) == verdict


@pytest.mark.parametrize(
    ("dropped", "command", "flags"),
    [
        (TransmissionFlag.SEND_TRIM, Command.TRIM, 0),
        (TransmissionFlag.SEND_WRITE_ZEROES, Command.WRITE_ZEROES, 0),
        (TransmissionFlag.SEND_FLUSH, Command.FLUSH, 0),
        (TransmissionFlag.SEND_FAST_ZERO, Command.WRITE_ZEROES, CommandFlag.FAST_ZERO),
    ],
)
def test_what_was_not_advertised_is_refused(dropped, command, flags):
    assert rules(flags=FLAGS & ~dropped).judge(command, flags, 0, 0) == Errno.EINVAL


def test_cache_is_served_although_not_advertised():
    assert (
        rules(flags=FLAGS & ~TransmissionFlag.SEND_CACHE).judge(Command.CACHE, 0, 0, 1) == ALLOWED
    )


@pytest.mark.parametrize(("offset", "length"), [(1, 0), (0, 1)])
def test_flush_has_neither_offset_nor_length(offset, length):
    assert rules().judge(Command.FLUSH, 0, offset, length) == Errno.EINVAL


@pytest.mark.parametrize(
    ("mode", "flags", "verdict"),
    [
        (ReplyMode.SIMPLE, 0, Errno.EINVAL),
        (ReplyMode.STRUCTURED, 0, Errno.EOVERFLOW),
        (ReplyMode.STRUCTURED, CommandFlag.DF, Errno.EOVERFLOW),
        (ReplyMode.EXTENDED, 0, Errno.EOVERFLOW),
    ],
)
def test_reads_above_the_maximum_payload(mode, flags, verdict):
    assert rules(mode).judge(Command.READ, flags, 0, MAX) == ALLOWED
    assert rules(mode).judge(Command.READ, flags, 0, MAX + 1) == verdict


def test_writes_above_the_maximum_payload():
    assert rules().judge(Command.WRITE, 0, 0, MAX) == ALLOWED
    assert rules().judge(Command.WRITE, 0, 0, MAX + 1) == Errno.EINVAL


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES, Command.CACHE])
def test_effects_may_cover_the_whole_export(command):
    assert rules().judge(command, 0, 0, SIZE) == ALLOWED


class TestBlockStatus:
    def test_needs_a_context(self):
        assert rules(ReplyMode.STRUCTURED).judge(Command.BLOCK_STATUS, 0, 0, 1) == Errno.EINVAL

    def test_with_contexts(self):
        with_contexts = rules(ReplyMode.STRUCTURED, contexts=BOTH)
        assert (
            with_contexts.judge(
                Command.BLOCK_STATUS, CommandFlag.REQ_ONE | CommandFlag.FUA, 0, SIZE
            )
            == ALLOWED
        )
        assert with_contexts.judge(Command.BLOCK_STATUS, 0, 1, SIZE) == Errno.EINVAL
        assert with_contexts.judge(Command.BLOCK_STATUS, 0, 0, 0) == Errno.EINVAL
        assert (
            with_contexts.judge(Command.BLOCK_STATUS, CommandFlag.PAYLOAD_LEN, 0, 1) == Errno.EINVAL
        )
        assert with_contexts.judge(Command.BLOCK_STATUS, CommandFlag.DF, 0, 1) == Errno.EINVAL

    def test_filter_payloads_with_extended_headers_only(self):
        extended = rules(ReplyMode.EXTENDED, contexts=BOTH)
        assert extended.judge(Command.BLOCK_STATUS, CommandFlag.PAYLOAD_LEN, 0, 1) == ALLOWED
