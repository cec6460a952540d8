"""Token files: what they let in, what is refused about them, and that changes count at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdstore.control import tokens
from nbdstore.control.routing import Access, Caller
from nbdstore.control.tokens import TokenFile
from nbdstore.errors import InvalidArgument


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """Make the file anew, as one that is renamed into place."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.chmod(mode)
    fresh.rename(path)


def test_roles_and_names(path: Path) -> None:
    write(path, "# ours\nadmin aaa alice\n\n  read bbb prometheus  \nread ccc\n")
    file = TokenFile(path)
    assert file.find(b"aaa") == Caller(Access.ADMIN, "alice")
    assert file.find(b"bbb") == Caller(Access.READ, "prometheus")
    assert file.find(b"ccc") == Caller(Access.READ, "a read token")
    for wrong in (b"", b"aa", b"aaaa", b"alice", b"admin", b"ours", b"a\xe9"):
        assert file.find(wrong) is None


@pytest.mark.parametrize("text", ["s3cret", "s3cret\n", "\n s3cret \n"])
def test_one_word_is_an_admin_token(path: Path, text: str) -> None:
    write(path, text)
    assert TokenFile(path).find(b"s3cret") == Caller(Access.ADMIN, "an admin token")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no token"),
        ("# admin aaa\n", "holds no token"),
        ("admin", "line 1: write 'admin TOKEN"),
        ("aaa\nbbb\n", "line 1: write 'admin TOKEN"),
        ("admin aaa\nroot bbb\n", "line 2: write 'admin TOKEN"),
        ("admin aaa alice wonder\n", "line 1: write 'admin TOKEN"),
        ("read\nread bbb\n", "line 1: write 'admin TOKEN"),
        ("admin a,b\nread c\n", "letters, digits"),
        ("admin aaa\nread aaa\n", "line 2: the token is that of another line"),
        ("read " + "x" * tokens.MAX_BYTES, "over 256 KiB"),
        ("read gr\u00fcn", "not plain text"),
    ],
)
def test_files_that_make_no_sense(path: Path, text: str, reason: str) -> None:
    write(path, text)
    with pytest.raises(InvalidArgument, match=reason) as raised:
        TokenFile(path)
    assert str(path) in str(raised.value)
    assert "aaa" not in str(raised.value), "secrets are not shown"


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602])
def test_what_everybody_may_read_is_no_secret(path: Path, mode: int) -> None:
    write(path, "s3cret", mode)
    with pytest.raises(InvalidArgument, match=f"mode {mode:o}.*chmod 600"):
        TokenFile(path)


def test_a_group_may_share_it(path: Path) -> None:
    write(path, "s3cret", 0o640)
    assert TokenFile(path).find(b"s3cret")


def test_a_file_that_is_missing(path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file"):
        TokenFile(path)


def test_changes_count_at_once(path: Path) -> None:
    write(path, "admin aaa\n")
    file = TokenFile(path)
    write(path, "admin bbb\n")
    assert (file.find(b"aaa"), file.find(b"bbb")) == (None, Caller(Access.ADMIN, "an admin token"))


@pytest.mark.parametrize("harm", ["removed", "opened", "garbled"])
def test_a_file_that_has_gone_wrong_lets_nobody_in(
    path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, "admin aaa\n")
    file = TokenFile(path)
    if harm == "removed":
        path.unlink()
    elif harm == "opened":
        path.chmod(0o644)
    else:
        path.write_text("admin\n")
    assert file.find(b"aaa") is None
    assert "until then nobody is let in" in caplog.text
    write(path, "admin aaa\n")
    assert file.find(b"aaa")
