"""The backup stream: what comes out is what went in, or an error; nothing in between."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable

import pytest
import xxhash

from nbdstore.control.backup_stream import (
    FRAME_HEADER_SIZE,
    MAX_PAYLOAD,
    BackupReader,
    BackupWriter,
    Begin,
    Data,
    Part,
    ResumeToken,
    Zeros,
)
from nbdstore.errors import BadStream, InvalidArgument, NbdstoreError, NoSpace

BEGIN = Begin(
    volume="db",
    snapshot="monday",
    uuid="b3bd1ea2-5ee1-4e5b-bd0e-7f3d2a4f5c11",
    size=1 << 20,
    created="2026-01-01T00:00:00+00:00",
)
SINCE = dataclasses.replace(
    BEGIN, base="c3bd1ea2-5ee1-4e5b-bd0e-7f3d2a4f5c11", base_name="db@sunday", base_size=4096
)
PARTS: list[Part] = [
    Data(0, [b"a" * 512]),
    Zeros(512, 4096),
    Data(8192, [b"b" * 100, memoryview(b"c" * 400)]),
    Data(8692, [b"d"]),
    Zeros(1 << 19, 1 << 19),
]
PREAMBLE = 16


def frames(begin: Begin = BEGIN, parts: list[Part] | None = None) -> list[bytes]:
    """A whole stream: the preamble with the first frame, the others, the end."""
    writer = BackupWriter()
    made = [writer.begin(begin)]
    made += [writer.part(part) for part in (PARTS if parts is None else parts)]
    return [b"".join(frame) for frame in [*made, writer.end()]]


def read(*chunks: bytes) -> tuple[Begin, list[Part]]:
    reader = BackupReader()
    parts = [part for chunk in chunks for part in reader.feed(chunk)]
    return reader.end(), parts


def plain(parts: list[Part]) -> list[tuple[int, bytes | int]]:
    return [
        (part.offset, part.length if isinstance(part, Zeros) else b"".join(part.buffers))
        for part in parts
    ]


@pytest.mark.parametrize("begin", [BEGIN, SINCE, dataclasses.replace(BEGIN, start=0, size=1 << 50)])
def test_a_stream_comes_out_as_it_went_in(begin: Begin) -> None:
    whole = b"".join(frames(begin))
    for chunks in ([whole], [bytes([byte]) for byte in whole], [whole[:700], whole[700:]]):
        found, parts = read(*chunks)
        assert found == begin
        assert plain(parts) == plain(PARTS)


def test_the_reader_counts() -> None:
    reader = BackupReader()
    for _ in reader.feed(b"".join(frames())):
        pass
    assert (reader.n_data_bytes, reader.n_zero_bytes) == (1013, 4096 + (1 << 19))
    assert (reader.n_frames, reader.position) == (7, 1 << 20)


def test_a_stream_of_nothing_is_whole() -> None:
    assert read(*frames(parts=[])) == (BEGIN, [])


def test_a_stream_that_goes_on_begins_where_it_does() -> None:
    begin = dataclasses.replace(BEGIN, start=8192)
    assert plain(read(*frames(begin, PARTS[2:]))[1]) == plain(PARTS[2:])
    with pytest.raises(BadStream, match="out of order"):
        read(*frames(begin, PARTS[1:]))


# -- damage -------------------------------------------------------------------------------------


def test_no_byte_can_change_unnoticed() -> None:
    whole = b"".join(frames(SINCE))
    for at in range(len(whole)):
        for flip in (0x01, 0x80):
            damaged = bytearray(whole)
            damaged[at] ^= flip
            with pytest.raises(BadStream):
                read(bytes(damaged))


def test_parts_before_the_damage_are_told_and_none_after_it() -> None:
    made = frames()
    made[3] = made[3][:-1] + b"x"
    reader = BackupReader()
    found: list[Part] = []
    with pytest.raises(BadStream, match=r"db@monday after offset 4608 is damaged"):
        found.extend(reader.feed(b"".join(made)))
    assert reader.position == 4608


def test_nowhere_can_it_be_cut_off_unnoticed() -> None:
    whole = b"".join(frames())
    for stop in range(len(whole)):
        with pytest.raises(BadStream, match="cut off"):
            read(whole[:stop])


@pytest.mark.parametrize("more", [b"\0", b"more", b"".join(frames())])
def test_nothing_may_follow(more: bytes) -> None:
    with pytest.raises(BadStream, match="after its end"):
        read(*frames(), more)


REARRANGED: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "lost": lambda made: [*made[:2], *made[3:]],
    "repeated": lambda made: [*made[:3], *made[2:]],
    "exchanged": lambda made: [made[0], made[2], made[1], *made[3:]],
    "of another stream": lambda made: [*made[:3], frames(SINCE)[3], *made[4:]],
    "the rest of another stream": lambda made: [*made[:3], *frames(SINCE)[3:]],
    "the end at once": lambda made: [made[0], made[-1]],
    "twice begun": lambda made: [made[0], made[0][PREAMBLE:], *made[1:]],
}


@pytest.mark.parametrize("how", REARRANGED)
def test_frames_that_are_whole_but_out_of_place_are_damage(how: str) -> None:
    with pytest.raises(BadStream):
        read(*REARRANGED[how](frames()))


@pytest.mark.parametrize("text", [b"", b"x", b"\x89NBDSTORE", b"x" * 100, b"PK\3\4" * 9])
def test_what_is_no_stream_is_told_apart(text: bytes) -> None:
    with pytest.raises(BadStream, match=r"not a backup stream|cut off"):
        read(text)


def test_a_transfer_as_text_is_noticed() -> None:
    with pytest.raises(BadStream, match="not a backup stream"):
        read(b"".join(frames()).replace(b"\r\n", b"\n"))


def test_a_newer_version_is_named() -> None:
    whole = bytearray(b"".join(frames()))
    whole[12] = 2
    with pytest.raises(BadStream, match=r"version 2.*version 1 is known"):
        read(bytes(whole))


# -- whole frames that make no sense ------------------------------------------------------------


def forged(*made: tuple[int, int, bytes]) -> bytes:
    """A stream of (kind, offset, payload) whose checksums are right."""
    whole = struct.pack("!12sB3x", b"\x89NBDSTORE\r\n\x1a", 1)
    checksum = xxhash.xxh3_64_digest(whole)
    for kind, offset, payload in made:
        place = struct.pack("!B3xIQ", kind, len(payload), offset)
        checksum = xxhash.xxh3_64_digest(checksum + place + payload)
        whole += place + checksum + payload
    return whole


def beginning(**members: object) -> tuple[int, int, bytes]:
    return (1, 0, json.dumps(BEGIN.to_json() | members).encode())


def test_what_is_forged_well_is_read() -> None:
    reader = BackupReader()
    (part,) = reader.feed(forged(beginning(later=1), (2, 0, b"abc")))
    assert plain([part]) == [(0, b"abc")]
    assert reader.begin == BEGIN


NONSENSE = {
    "no JSON": [(1, 0, b"{")],
    "no object": [(1, 0, b"[]")],
    "without a size": [(1, 0, b'{"volume": "x", "snapshot": "y", "uuid": "z", "created": "w"}')],
    "a size that is a text": [beginning(size="1")],
    "no uuid": [beginning(uuid="")],
    "a uuid that is none": [beginning(uuid="x")],
    "a uuid written otherwise": [beginning(uuid=BEGIN.uuid.upper())],
    "a uuid that is a number": [beginning(uuid=1)],
    "a start beyond the end": [beginning(start=2 << 20)],
    "a negative start": [beginning(start=-1)],
    "half a base": [beginning(base="x")],
    "a base without uuid": [beginning(base="", base_name="x", base_size=1)],
    "a base whose uuid is none": [beginning(base="x", base_name="x", base_size=1)],
    "data first": [(2, 0, b"abc")],
    "an unknown kind": [beginning(), (9, 0, b"")],
    "data beyond the end": [beginning(), (2, (1 << 20) - 1, b"ab")],
    "no data": [beginning(), (2, 0, b"")],
    "zeros beyond the end": [beginning(), (3, 4096, struct.pack("!Q", 1 << 20))],
    "no zeros": [beginning(), (3, 0, struct.pack("!Q", 0))],
    "zeros that wrap around": [beginning(), (3, 1, struct.pack("!Q", (1 << 64) - 1))],
    "zeros of an odd length": [beginning(), (3, 0, b"1234")],
    "data that goes back": [beginning(), (2, 5, b"abc"), (2, 4, b"a")],
    "an end that counts wrong": [beginning(), (4, 5, b"x" * 16)],
    "too long a frame": [beginning(), (2, 0, bytes(MAX_PAYLOAD + 1))],
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused(what: str) -> None:
    with pytest.raises(BadStream):
        read(forged(*NONSENSE[what]))


def test_a_reader_keeps_no_more_than_a_frame() -> None:
    writer = BackupWriter()
    reader = BackupReader()
    payload = bytes(MAX_PAYLOAD)
    size = 64 * MAX_PAYLOAD
    for _ in reader.feed(b"".join(writer.begin(dataclasses.replace(BEGIN, size=size)))):
        pass
    for n in range(3):
        frame = b"".join(writer.part(Data(n * MAX_PAYLOAD, [payload])))
        assert list(reader.feed(frame[:-1])) == []
        assert len(reader._buffer) < FRAME_HEADER_SIZE + MAX_PAYLOAD
        assert len(list(reader.feed(frame[-1:]))) == 1
        assert not reader._buffer


def test_what_the_sender_could_not_do_is_what_the_receiver_raises() -> None:
    writer = BackupWriter()
    whole = b"".join(writer.begin(BEGIN) + writer.failed(NoSpace("the disk is full of eels")))
    with pytest.raises(NoSpace, match="eels"):
        read(whole)


# -- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, SINCE.uuid])
def test_a_token_comes_back(base: str | None) -> None:
    token = ResumeToken(uuid=BEGIN.uuid, base=base, start=123 << 30)
    text = token.encode()
    assert text.isascii()
    assert not set(text) & set(" '\"$&|;<>()\\\n=")
    assert ResumeToken.decode(text) == token


def test_a_token_with_a_typing_mistake_is_refused() -> None:
    text = ResumeToken(uuid=BEGIN.uuid, base=None, start=0).encode()
    wrong = [text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :] for at in range(9)]
    for given in ["", "1.", "2." + text[2:], "x", text[:-2], text + "AAAA", "1.ä", *wrong]:
        with pytest.raises(InvalidArgument, match="no resume token"):
            ResumeToken.decode(given)


def test_every_error_of_a_stream_is_one_that_people_can_read() -> None:
    assert issubclass(BadStream, NbdstoreError)
    assert (BadStream.exit_status, BadStream.http_status) == (1, 400)
