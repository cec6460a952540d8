"""What `make` says on a machine that lacks something: what is missing, and how to get it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.children import Children

SCRIPTS = Path(__file__).parents[1] / "scripts"


def write_program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def make_venv(children: Children, python: Path | str) -> str:
    directory = children.directory / "venv"
    script = SCRIPTS / "make-venv"
    return children.run(script, directory, env={"PYTHON": str(python)}, status=1)


def test_a_python_that_is_too_old_is_named(children: Children, tmp_path: Path) -> None:
    old = write_program(tmp_path / "python", "exit 1")
    assert f"PYTHON={old} is not Python 3.11" in make_venv(children, old)


def test_a_python_without_venv_is_told_the_package(children: Children, tmp_path: Path) -> None:
    text = "case $2 in *ensurepip*) exit 1 ;; esac"
    python = write_program(tmp_path / "python", text)
    assert "apt-get install python3-venv" in make_venv(children, python)


def test_a_machine_without_python_is_told_so(children: Children, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    env = {"PYTHON": "", "PATH": str(tmp_path / "bin")}
    output = children.run(SCRIPTS / "make-venv", tmp_path / "venv", env=env, status=1)
    assert "needs Python 3.11 or newer" in output


@pytest.mark.requires("dpkg-query")
def test_missing_packages_are_named(children: Children, tmp_path: Path) -> None:
    packages = tmp_path / "packages.txt"
    packages.write_text(
        "# A comment.\nbase-files  # here on every Debian\nno-such-package  # not\n"
    )
    (tmp_path / "bin").mkdir()
    write_program(tmp_path / "bin" / "id", "echo 1000")
    output = children.run(
        *(SCRIPTS / "install-packages", packages),
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
        status=1,
    )
    assert "apt-get install --no-install-recommends no-such-package\n" in output
