"""Errors over HTTP: what a server raises is what its client raises."""

from __future__ import annotations

import pytest

from nbdstore import errors
from nbdstore.agent.attachments import AtWork
from nbdstore.control import problems
from nbdstore.errors import ControlError, Corruption, NbdstoreError


def every_class() -> list[type[NbdstoreError]]:
    """All of the one tree; what other packages add for themselves is told as its parent."""
    return [
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, NbdstoreError)
    ]


def test_an_error_without_a_code_of_its_own_comes_back_as_its_parent() -> None:
    error = problems.load(problems.dump(AtWork("volume 'x' is being detached")))
    assert type(error) is errors.Busy


@pytest.mark.parametrize("cls", [c for c in every_class() if c is not Corruption])
def test_every_error_comes_back_as_itself(cls: type[NbdstoreError]) -> None:
    error = problems.load(problems.dump(cls("volume 'x' is gone")))
    assert type(error) is cls
    assert str(error) == "volume 'x' is gone"


def test_corruption_comes_back_with_its_text() -> None:
    original = Corruption("data offset 4096", "aa", "bb", "run check")
    error = problems.load(problems.dump(original))
    assert type(error) is Corruption
    assert str(error) == str(original)


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in every_class()]
    assert len(codes) == len(set(codes))
    assert errors.NotFound.code == "not-found"


def test_an_unknown_code_of_a_newer_server_keeps_its_message() -> None:
    error = problems.load(b'{"code": "quantum", "detail": "it is both"}')
    assert type(error) is NbdstoreError
    assert str(error) == "it is both"


def test_a_bug_is_told_without_its_details() -> None:
    problem = problems.to_json(KeyError("secret"))
    assert problem["status"] == 500
    assert "secret" not in problem["detail"]


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"code": "busy"}', b"\xff"])
def test_what_is_no_problem_is_a_control_error(body: bytes) -> None:
    error = problems.load(body, 502)
    assert type(error) is ControlError
    assert "502" in str(error)
