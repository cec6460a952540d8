"""What the command line refuses, and what it lists."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import cli, results
from benchmarks.cli import main
from benchmarks.rows import rows
from benchmarks.scale import NORMAL
from tests.benchmarks import made_up
from tests.benchmarks.test_rounds import peer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run no-such-row", "'no-such-row' is no row and no group"),
        ("run fsync --peers nbdkit,tgt", "'tgt' is no peer: choose from nbdstore, nbdkit"),
        ("run fsync --quick --full", "one of --quick, --full and --smoke"),
        ("run fsync --against /", "/ is no checkout of nbdstore"),
        ("guest no-such-row", "'no-such-row' is no row and no group"),
        ("guest --peers tgt", "'tgt' is no peer"),
        ("report /", "no results in /"),
    ],
)
def test_a_mistake_is_told(arguments: str, words: str) -> None:
    done = CliRunner().invoke(main, arguments.split())
    assert done.exit_code != 0
    assert words in done.output


def test_rows_are_listed_with_their_question_and_goal() -> None:
    done = CliRunner().invoke(main, ["list", "fsync"])
    assert done.exit_code == 0
    assert "fsync-8-clients" in done.output
    assert "[>= 2 x the best peer]" in done.output
    assert "random-read" not in done.output


def test_the_list_is_there_as_json() -> None:
    done = CliRunner().invoke(main, ["list", "--json"])
    assert [row["name"] for row in json.loads(done.output)] == [row.name for row in rows(NORMAL)]


def test_a_report_is_rendered_again_from_the_results_alone(tmp_path: Path) -> None:
    results.save(made_up.run(made_up.row(nbdstore=[2.0], nbdkit=[1.0])), tmp_path)
    done = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert done.exit_code == 0
    assert (tmp_path / "results.md").read_text() in done.output
    assert (tmp_path / "random.svg").exists()
    as_json = CliRunner().invoke(main, ["report", str(tmp_path), "--json"])
    assert json.loads(as_json.output)["rows"][0]["ratio"] == 2.0


@pytest.mark.requires("fio", "setpriv")
def test_a_run_in_which_all_have_failed_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfit = dataclasses.replace(peer("unfit"), version=("fio", "--version"))
    monkeypatch.setattr(cli, "NBDSTORE", unfit)
    arguments = f"run fsync-each-write --smoke --peers= --disk {tmp_path} --output {tmp_path}/out"
    done = CliRunner().invoke(main, arguments.split())
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 1
    assert "- all: cannot make its disk (`fsync-each-write`)" in done.output
    assert "Left out" not in done.output
