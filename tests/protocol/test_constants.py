"""The layouts have the sizes that the specification draws (proto.md)."""

import pytest

from nbdstore.protocol import constants


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (constants.HELLO, 18),
        (constants.CLIENT_FLAGS, 4),
        (constants.OPTION, 16),
        (constants.OPTION_REPLY, 20),
        (constants.EXPORT_NAME_REPLY, 10),
        (constants.INFO_EXPORT, 12),
        (constants.INFO_BLOCK_SIZE, 14),
        (constants.REQUEST, 28),
        (constants.EXTENDED_REQUEST, 32),
        (constants.SIMPLE_REPLY, 16),
        (constants.STRUCTURED_REPLY, 20),
        (constants.EXTENDED_REPLY, 32),
        (constants.OFFSET_HOLE, 12),
        (constants.ERROR, 6),
        (constants.EXTENT, 8),
        (constants.EXTENDED_EXTENT, 16),
        (constants.BLOCK_STATUS_EXT, 8),
    ],
)
def test_layout_sizes(layout, size):
    assert layout.size == size


def test_magics_are_the_words_they_spell():
    assert constants.INIT_PASSWD.to_bytes(8, "big") == b"NBDMAGIC"
    assert constants.OPTION_MAGIC.to_bytes(8, "big") == b"IHAVEOPT"
    assert len(constants.EXPORT_NAME_PADDING) == 124


def test_errors_are_those_of_linux():
    import errno

    for error in constants.Errno:
        assert error == getattr(errno, error.name)
