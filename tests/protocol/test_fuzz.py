"""Whatever bytes come, only ProtocolError comes out, and every limit holds."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import Agreement, MetaContext, Offer, ReplyMode, TlsMode
from nbdstore.protocol.client import (
    ClientTransmission,
    build_info,
    build_meta_context,
    build_option,
)
from nbdstore.protocol.constants import (
    CLIENT_FLAGS,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    OPTION,
    OPTION_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Command,
    TransmissionFlag,
)
from nbdstore.protocol.handshake import Handshake, HandshakeLimits, Phase
from nbdstore.protocol.rules import Rules
from nbdstore.protocol.transmission import RequestParser
from tests.protocol.conversation import FLAGS, Shelf

SIZE = 1 << 20

names = st.sampled_from(["disk", "", "secret", "barred", "nothing"])
queries = st.lists(st.sampled_from(["base:", "base:allocation", "qemu:", "x"]), max_size=3)
option_data = st.one_of(
    st.just(b""),
    st.binary(max_size=40),
    st.builds(build_info, names, st.lists(st.integers(0, 5), max_size=3)),
    st.builds(build_meta_context, names, queries),
)
options = st.one_of(
    st.builds(build_option, st.integers(0, 12), option_data),
    st.builds(
        OPTION.pack, st.just(OPTION_MAGIC), st.integers(0, 12), st.integers(0, (1 << 32) - 1)
    ),
    st.binary(max_size=20),
)


@settings(max_examples=300)
@given(
    flags=st.one_of(st.sampled_from([1, 3]), st.integers(0, 4)),
    stream=st.lists(options, max_size=12).map(b"".join),
    tls=st.sampled_from(TlsMode),
    step=st.integers(1, 64),
)
def test_handshakes(flags, stream, tls, step):
    limits = HandshakeLimits(max_options=8, max_option_length=64, max_option_bytes=256)
    handshake = Handshake(Shelf(), tls=tls, limits=limits)
    stream = CLIENT_FLAGS.pack(flags) + stream
    try:
        for start in range(0, len(stream), step):
            handshake.receive(stream[start : start + step])
            while handshake.advance():
                assert all(len(reply) < 4096 + 20 for reply in handshake.data_to_send())
            if handshake.phase is Phase.STARTTLS:
                handshake.tls_established()
    except ProtocolError as fault:
        assert str(fault)
    assert (handshake.agreement is not None) == (handshake.phase is Phase.TRANSMISSION)


commands = st.integers(0, 10)
flag_bits = st.one_of(st.just(0), st.integers(0, 63), st.integers(0, 0xFFFF))
offsets = st.one_of(st.integers(0, 2 * SIZE), st.integers(0, (1 << 64) - 1))
lengths = st.one_of(st.integers(0, 3000), st.integers(0, (1 << 32) - 1))


def raw_request(extended, command, flags, offset, length, payload):
    layout = EXTENDED_REQUEST if extended else REQUEST
    magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
    return layout.pack(magic, flags, command, b"cookie!!", offset, length) + payload


def streams(extended):
    honest = st.builds(
        lambda command, flags, offset, payload: raw_request(
            extended, command, flags, offset, len(payload), payload
        ),
        st.just(1),
        flag_bits,
        offsets,
        st.binary(max_size=600),
    )
    any_request = st.builds(
        raw_request, st.just(extended), commands, flag_bits, offsets, lengths, st.just(b"")
    )
    return st.lists(st.one_of(honest, any_request, st.binary(max_size=4)), max_size=8)


@settings(max_examples=400)
@given(st.data(), st.sampled_from(ReplyMode), st.booleans(), st.integers(1, 5000))
def test_requests(data, mode, read_only, step):
    flags = FLAGS | TransmissionFlag.SEND_DF
    if read_only:
        flags |= TransmissionFlag.READ_ONLY
    contexts = () if mode is ReplyMode.SIMPLE else tuple(MetaContext)
    agreement = Agreement(Offer("disk", SIZE, flags), flags, mode, contexts)
    parser = RequestParser(Rules(agreement), receive_bytes=1000, direct_bytes=400)
    stream = b"".join(data.draw(streams(mode is ReplyMode.EXTENDED)))
    try:
        while stream:
            buffer = parser.get_buffer()
            n = min(len(buffer), step, len(stream))
            assert n > 0
            buffer[:n], stream = stream[:n], stream[n:]
            for request in parser.received(n):
                check(request, read_only)
    except ProtocolError as fault:
        assert str(fault)


def check(request, read_only):
    """What the server may rely on."""
    command, _, cookie, offset, length, payload, verdict = request
    assert len(cookie) == 8
    if verdict == 0 and command not in (Command.DISC, Command.FLUSH):
        assert 0 <= offset <= offset + length <= SIZE
        assert length > 0
        if command == Command.WRITE:
            assert len(payload) == length
        if command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES):
            assert not read_only


@settings(max_examples=200)
@given(st.sampled_from(ReplyMode), st.binary(max_size=200), st.integers(1, 50))
def test_replies(mode, stream, step):
    client = ClientTransmission(mode)
    for command in (Command.READ, Command.WRITE, Command.BLOCK_STATUS):
        client.request(command, 0, 16)
    try:
        for start in range(0, len(stream), step):
            client.receive(stream[start : start + step])
    except ProtocolError as fault:
        assert str(fault)
