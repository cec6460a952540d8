"""Data of options: every length that lies is refused, never believed."""

import pytest

from nbdstore.protocol.agreement import Offer, OptionRefused
from nbdstore.protocol.client import build_info, build_meta_context, parse_info_export
from nbdstore.protocol.constants import U16, U32, Info, OptionReply, TransmissionFlag
from nbdstore.protocol.options import (
    MAX_MESSAGE,
    build_infos,
    clip_message,
    parse_info,
    parse_meta_context,
)


def counted(text: bytes) -> bytes:
    return U32.pack(len(text)) + text


@pytest.mark.parametrize(
    ("name", "infos"), [("", []), ("disk", [0]), ("Datenträger", [3, 0, 1, 2, 999])]
)
def test_info_is_parsed(name, infos):
    assert parse_info(build_info(name, infos)) == (name, infos)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 5,
        U32.pack(1) + U16.pack(0),  # the name does not fit
        U32.pack(0xFFFFFFFF) + b"disk" + U16.pack(0),
        counted(b"disk") + U16.pack(1),  # an info is missing
        counted(b"disk") + U16.pack(0xFFFF) + b"\0\0",
        counted(b"disk") + U16.pack(0) + b"\0",  # a byte too many
        counted(b"\xff\xfe") + U16.pack(0),  # no UTF-8
        counted(b"a\0b") + U16.pack(0),
        counted(b"x" * 4097) + U16.pack(0),
    ],
)
def test_info_that_lies_is_refused(data):
    with pytest.raises(OptionRefused) as refused:
        parse_info(data)
    assert refused.value.reply is OptionReply.ERR_INVALID
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "queries"), [("", []), ("disk", ["base:allocation"]), ("disk", ["a:b", "", "c:d"])]
)
def test_meta_context_is_parsed(name, queries):
    assert parse_meta_context(build_meta_context(name, queries)) == (name, queries)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        U32.pack(4),
        counted(b"disk"),  # no number of queries
        counted(b"disk") + U32.pack(1),
        counted(b"disk") + U32.pack(0xFFFFFFFF),
        counted(b"disk") + U32.pack(1) + U32.pack(5) + b"base",
        counted(b"disk") + U32.pack(0) + b"x",
        counted(b"disk") + U32.pack(2) + counted(b"base:") + b"\0\0\0",
        counted(b"disk") + U32.pack(1) + counted(b"\xc3"),
    ],
)
def test_meta_context_that_lies_is_refused(data):
    with pytest.raises(OptionRefused) as refused:
        parse_meta_context(data)
    assert refused.value.reply is OptionReply.ERR_INVALID


def test_messages_are_clipped_between_characters():
    clipped = clip_message("ä" * 5000)
    assert len(clipped) <= MAX_MESSAGE
    assert clipped.decode().endswith("ä...")
    assert clip_message("Short.") == b"Short."


OFFER = Offer("disk", 1 << 40, TransmissionFlag.HAS_FLAGS, description="the big one")


def test_export_info_comes_unasked_and_first():
    infos = build_infos(OFFER, OFFER.flags, [])
    assert [parse_info_export(info) for info in infos] == [parse_info_export(infos[0])]
    assert parse_info_export(infos[0]).size == 1 << 40


def test_all_infos_are_told_once_when_asked():
    infos = build_infos(OFFER, OFFER.flags, [3, 3, 1, 2, 77])
    assert infos[1:] == [
        U16.pack(Info.NAME) + b"disk",
        bytes.fromhex("0003 00000001 00001000 02000000"),
        U16.pack(Info.DESCRIPTION) + b"the big one",
    ]
