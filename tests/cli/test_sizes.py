"""Sizes as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstore.errors import InvalidArgument
from nbdstore.sizes import MAX_SIZE, exact_size, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("4K", 4096),
        ("4k", 4096),
        ("4 KiB", 4096),
        ("512M", 512 << 20),
        ("10G", 10 << 30),
        ("10GiB", 10 << 30),
        ("1.5T", 1536 << 30),
        (" 2P ", 2 << 50),
        ("7.5E", 15 << 59),
        ("0.5K", 512),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_what_people_write(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a size: write it as 10G"),
        ("ten", "'ten' is not a size"),
        ("10GB", "units are powers of 1024 and have no B"),
        ("10 kb", "units are powers of 1024 and have no B"),
        ("-5G", "'-5G' is not a size"),
        ("1e9", "'1e9' is not a size"),
        ("1_000", "'1_000' is not a size"),
        ("0x10", "'0x10' is not a size"),
        ("\u0967\u0966G", "is not a size"),
        ("10X", "'10X' is not a size"),
        ("5Gi", "'5Gi' is not a size"),
        ("1.5", "'1.5' is not a whole number of bytes"),
        ("1.3K", "'1.3K' is not a whole number of bytes"),
        ("8E", "'8E' is too large: a size must be under 8 EiB"),
        ("9" * 20, "is too large"),
        ("9" * 1000, "is not a size"),
    ],
)
def test_what_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        parse_size(text)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10 << 30, "10 GiB"),
        (1536 << 30, "1.5 TiB"),
        ((1 << 30) - 1, "1 GiB"),
        (MAX_SIZE, "8 EiB"),
        (1 << 70, "1024 EiB"),
    ],
)
def test_what_people_read(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, MAX_SIZE))
def test_what_is_printed_is_near_the_truth_and_can_be_typed(size: int) -> None:
    try:
        again = parse_size(format_size(size))
    except InvalidArgument:  # "1.3 KiB" is no whole number of bytes; "8 EiB" is over the limit
        return
    assert abs(again - size) <= size * 0.05


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (4 << 20, "4 MiB"),
        (1536 << 30, "1.5 TiB"),
        ((1 << 20) + 512, "1 MiB (1049088 bytes)"),
        (MAX_SIZE, "8 EiB (9223372036854775807 bytes)"),
        (MAX_SIZE + 1, "more than 8 EiB"),
        (10**4000, "more than 8 EiB"),
    ],
)
def test_what_may_have_to_be_given_back_is_exact(size: int, text: str) -> None:
    assert exact_size(size) == text


@given(st.integers(0, MAX_SIZE))
def test_an_exact_size_can_be_given_back(size: int) -> None:
    text = exact_size(size)
    shown, _, number = text.partition(" (")
    assert int(number.removesuffix(" bytes)")) if number else parse_size(shown) == size
