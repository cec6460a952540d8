"""The handshake as a client sees it: every case whole, byte by byte, and with more behind it."""

import pytest

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import BASE_ALLOCATION, CONTEXTS, Offer, ReplyMode, TlsMode
from nbdstore.protocol.client import (
    ClientHandshake,
    build_info,
    build_meta_context,
    build_option,
    parse_info_export,
)
from nbdstore.protocol.constants import (
    CLIENT_FLAGS,
    OPTION,
    OPTION_MAGIC,
    U32,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdstore.protocol.handshake import Handshake, HandshakeLimits, Phase
from tests.protocol.conversation import (
    DELIVERIES,
    DISK,
    FLAGS,
    SIZE,
    TRAILING,
    Shelf,
    answers,
    ask,
    deliver,
    started,
)

pytestmark = pytest.mark.parametrize("how", DELIVERIES)

GO = build_option(Option.GO, build_info("disk"))
STRUCTURED = build_option(Option.STRUCTURED_REPLY)
EXTENDED = build_option(Option.EXTENDED_HEADERS)
STARTTLS = build_option(Option.STARTTLS)


def set_contexts(name="disk", queries=("base:allocation",)) -> bytes:
    return build_option(Option.SET_META_CONTEXT, build_meta_context(name, queries))


def new(tls=TlsMode.OFF, **limits) -> Handshake:
    return started(Handshake(Shelf(), tls=tls, limits=HandshakeLimits(**limits)))


def replies(handshake, data, how):
    return [OptionReply(answer.reply) for answer in ask(handshake, data, how)]


# --- Hello ----------------------------------------------------------------------------------------


def test_hello_offers_fixed_newstyle(how):
    client = ClientHandshake()
    client.receive(b"".join(Handshake(Shelf()).data_to_send()))
    client.hello()
    assert client.handshake_flags == 0b11


@pytest.mark.parametrize("flags", [1 << 2, 1 << 31, 0xFFFFFFFF])
def test_client_flags_that_were_not_offered_drop_the_client(how, flags):
    with pytest.raises(ProtocolError, match="not offered"):
        deliver(Handshake(Shelf()), CLIENT_FLAGS.pack(flags), how)


def test_an_option_without_its_magic_drops_the_client(how):
    with pytest.raises(ProtocolError, match="IHAVEOPT"):
        deliver(new(), b"GET / HTTP/1.1\r\n\r\n", how)


# --- Choosing an export --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["disk", ""])
def test_go_ends_the_handshake(how, name):
    handshake = new()
    export, ack = ask(handshake, build_option(Option.GO, build_info(name)), how)
    assert (parse_info_export(export.data).size, ack.reply) == (SIZE, OptionReply.ACK)
    assert handshake.phase is Phase.TRANSMISSION
    assert handshake.agreement.offer is DISK
    assert handshake.unread() == (TRAILING if how == "with more behind" else b"")


def test_info_then_go_tell_the_same(how):
    handshake = new()
    info = build_info("disk", [0, 1, 2, 3])
    first = ask(handshake, build_option(Option.INFO, info))
    assert handshake.phase is Phase.OPTIONS
    second = ask(handshake, build_option(Option.GO, info), how)
    assert [a.data for a in first] == [a.data for a in second]
    assert len(first) == 5


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("nothing", OptionReply.ERR_UNKNOWN),
        ("barred", OptionReply.ERR_POLICY),
        ("secret", OptionReply.ERR_TLS_REQD),
    ],
)
def test_exports_that_cannot_be_had(how, option, name, reply):
    handshake = new(TlsMode.OPTIONAL)
    (answer,) = ask(handshake, build_option(option, build_info(name)), how)
    assert answer.reply == reply
    assert answer.data.endswith(b".")
    assert handshake.phase is Phase.OPTIONS


@pytest.mark.parametrize(("flags", "padding"), [(1, 124), (3, 0), (0, 124), (2, 0)])
def test_export_name(how, flags, padding):
    handshake = started(Handshake(Shelf()), flags)
    sent = deliver(handshake, build_option(Option.EXPORT_NAME, b"disk"), how)
    assert len(sent) == 10 + padding
    client = ClientHandshake(flags)
    client.receive(sent)
    answer = client.export_name_answer()
    assert (answer.size, answer.flags) == (SIZE, FLAGS)
    assert handshake.phase is Phase.TRANSMISSION


@pytest.mark.parametrize("name", [b"nothing", b"secret", b"barred", b"\xff", b"a\0", b"x" * 4097])
def test_export_name_that_fails_closes_without_a_word(how, name):
    handshake = new()
    assert deliver(handshake, build_option(Option.EXPORT_NAME, name), how) == b""
    assert handshake.phase is Phase.CLOSED
    assert handshake.reason


def test_clients_without_fixed_newstyle_have_export_name_only(how):
    with pytest.raises(ProtocolError, match="fixed newstyle"):
        deliver(started(Handshake(Shelf()), 0), GO, how)


# --- Other options -------------------------------------------------------------------------------


def test_list_names_all_exports(how):
    shelf = Shelf(DISK, Offer("b", 1, TransmissionFlag.HAS_FLAGS))
    *servers, ack = ask(started(Handshake(shelf)), build_option(Option.LIST), how)
    assert [s.data for s in servers] == [U32.pack(4) + b"diska disk", U32.pack(1) + b"b"]
    assert ack.reply == OptionReply.ACK


def test_abort_is_acknowledged(how):
    handshake = new()
    assert replies(handshake, build_option(Option.ABORT, b"whatever"), how) == [OptionReply.ACK]
    assert handshake.phase is Phase.CLOSED


@pytest.mark.parametrize("option", [Option.LIST, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
def test_data_where_none_belongs_is_refused(how, option):
    sent = deliver(new(), build_option(option, b"x") + build_option(Option.ABORT), how)
    assert [answer.reply for answer in answers(sent)] == [OptionReply.ERR_INVALID, OptionReply.ACK]


@pytest.mark.parametrize("option", [0, Option.PEEK_EXPORT, 12, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 5000])
def test_unknown_options_are_consumed_and_refused(how, option, length):
    handshake = new()
    sent = deliver(handshake, build_option(option, b"?" * length) + STRUCTURED, how)
    assert [answer.reply for answer in answers(sent)] == [OptionReply.ERR_UNSUP, OptionReply.ACK]


# --- Modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        (b"", ReplyMode.SIMPLE),
        (STRUCTURED, ReplyMode.STRUCTURED),
        (EXTENDED, ReplyMode.EXTENDED),
        (STRUCTURED + EXTENDED, ReplyMode.EXTENDED),
        (EXTENDED + STRUCTURED, ReplyMode.EXTENDED),
        (EXTENDED + EXTENDED, ReplyMode.EXTENDED),
    ],
)
def test_the_reply_mode(how, options, mode):
    handshake = new()
    deliver(handshake, options + GO, how)
    assert handshake.agreement.mode is mode
    flags = handshake.agreement.flags
    assert bool(flags & TransmissionFlag.SEND_DF) is (mode is not ReplyMode.SIMPLE)
    assert not flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD


@pytest.mark.parametrize(
    ("options", "last"),
    [
        (STRUCTURED + STRUCTURED, OptionReply.ERR_INVALID),
        (EXTENDED + EXTENDED, OptionReply.ERR_INVALID),
        (EXTENDED + STRUCTURED, OptionReply.ERR_EXT_HEADER_REQD),
    ],
)
def test_asking_twice_is_refused(how, options, last):
    assert replies(new(), options, how) == [OptionReply.ACK, last]


def test_export_name_is_forbidden_with_extended_headers(how):
    handshake = new()
    deliver(handshake, EXTENDED + build_option(Option.EXPORT_NAME, b"disk"), how)
    assert handshake.phase is Phase.CLOSED


# --- Metadata contexts ---------------------------------------------------------------------------


def test_listing_contexts_tells_id_zero(how):
    listing = build_option(Option.LIST_META_CONTEXT, build_meta_context("disk", []))
    *contexts, ack = ask(new(), listing, how)
    assert [c.data for c in contexts] == [
        U32.pack(0) + context.label.encode() for context in CONTEXTS
    ]
    assert ack.reply == OptionReply.ACK


def test_selected_contexts_are_agreed_on(how):
    handshake = new()
    *_, context, ack = ask(handshake, STRUCTURED + set_contexts())
    assert context.data == U32.pack(1) + b"base:allocation"
    assert ack.reply == OptionReply.ACK
    deliver(handshake, GO, how)
    assert handshake.agreement.contexts == (BASE_ALLOCATION,)


def test_filter_payloads_are_advertised_with_contexts_and_extended_headers(how):
    handshake = new()
    deliver(handshake, EXTENDED + set_contexts() + GO, how)
    assert handshake.agreement.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD


@pytest.mark.parametrize(
    "spoiler",
    [
        set_contexts(queries=()),
        set_contexts(queries=["base:"]),
        set_contexts("nothing"),
        set_contexts("secret"),
        build_option(Option.SET_META_CONTEXT, b"\xff"),
        build_option(Option.SET_META_CONTEXT, bytes(HandshakeLimits.max_option_length + 1)),
        set_contexts(""),  # another name than that of GO, though the same export
    ],
)
def test_a_later_set_replaces_the_contexts_even_if_it_fails(how, spoiler):
    handshake = new(TlsMode.OPTIONAL)
    deliver(handshake, STRUCTURED + set_contexts() + spoiler + GO, how)
    assert handshake.agreement.contexts == ()


def test_setting_contexts_needs_structured_replies(how):
    assert replies(new(), set_contexts(), how) == [OptionReply.ERR_INVALID]


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("name", "reply"),
    [("nothing", OptionReply.ERR_UNKNOWN), ("secret", OptionReply.ERR_POLICY)],
)
def test_contexts_of_exports_that_cannot_be_had(how, option, name, reply):
    asked = build_option(option, build_meta_context(name, []))
    assert replies(new(TlsMode.OPTIONAL), STRUCTURED + asked, how)[1:] == [reply]


# --- TLS -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [2, 5])
def test_required_tls_lets_abort_and_starttls_pass(how, option):
    how = "whole"  # bytes behind STARTTLS are a fault of their own
    assert replies(new(TlsMode.REQUIRED), build_option(option), how) == [OptionReply.ACK]


@pytest.mark.parametrize("option", [3, 4, 6, 7, 8, 9, 10, 11, 0, 99, 0xFFFFFFFF])
def test_required_tls_refuses_everything_else_before(how, option):
    handshake = new(TlsMode.REQUIRED)
    assert replies(handshake, build_option(option, b"junk"), how) == [OptionReply.ERR_TLS_REQD]
    assert handshake.phase is Phase.OPTIONS


def test_required_tls_closes_on_export_name(how):
    handshake = new(TlsMode.REQUIRED)
    assert deliver(handshake, build_option(Option.EXPORT_NAME, b"disk"), how) == b""
    assert handshake.phase is Phase.CLOSED


def test_tls_that_is_off_is_refused_by_policy(how):
    assert replies(new(), STARTTLS, how) == [OptionReply.ERR_POLICY]


@pytest.mark.parametrize("mode", [TlsMode.OPTIONAL, TlsMode.REQUIRED])
def test_starttls_forgets_what_was_agreed(how, mode):
    handshake = started(Handshake(Shelf(), tls=mode))
    if mode is TlsMode.OPTIONAL:
        deliver(handshake, STRUCTURED + set_contexts())
    assert replies(handshake, STARTTLS, "whole") == [OptionReply.ACK]
    assert handshake.phase is Phase.STARTTLS
    handshake.tls_established()
    deliver(handshake, GO, how)
    assert handshake.agreement.mode is ReplyMode.SIMPLE
    assert handshake.agreement.contexts == ()


def test_starttls_twice_is_refused(how):
    handshake = new(TlsMode.REQUIRED)
    ask(handshake, STARTTLS)
    handshake.tls_established()
    assert replies(handshake, STARTTLS, how) == [OptionReply.ERR_INVALID]


def test_plaintext_behind_starttls_drops_the_client(how):
    with pytest.raises(ProtocolError, match="plaintext"):
        deliver(new(TlsMode.REQUIRED), STARTTLS + TRAILING, "whole")


def test_starttls_with_data_is_refused(how):
    starttls = build_option(Option.STARTTLS, b"x")
    assert replies(new(TlsMode.OPTIONAL), starttls, how) == [OptionReply.ERR_INVALID]


# --- Limits --------------------------------------------------------------------------------------


def test_an_option_that_is_too_long_is_read_past(how):
    handshake = new(max_option_length=100)
    sent = deliver(handshake, build_option(Option.GO, b"?" * 101) + GO, how)
    first, *rest = answers(sent)
    assert first.reply == OptionReply.ERR_TOO_BIG
    assert rest[-1].reply == OptionReply.ACK
    assert handshake.phase is Phase.TRANSMISSION


def test_options_are_counted(how):
    with pytest.raises(ProtocolError, match="more than 3 options"):
        deliver(new(max_options=3), STRUCTURED * 4, how)


def test_bytes_of_options_are_counted_before_they_arrive(how):
    header = OPTION.pack(OPTION_MAGIC, 99, 0xFFFFFFFF)
    with pytest.raises(ProtocolError, match="bytes of options"):
        deliver(new(), header, how)


def test_one_option_is_handled_at_a_time(how):
    handshake = new()
    handshake.receive(build_option(Option.LIST) * 2)
    assert handshake.advance()
    assert len(answers(b"".join(handshake.data_to_send()))) == 2
    assert handshake.advance()
    assert not handshake.advance()


def test_nothing_is_taken_after_the_end(how):
    handshake = new()
    deliver(handshake, build_option(Option.ABORT), how)
    assert deliver(handshake, GO) == b""
    assert handshake.phase is Phase.CLOSED
