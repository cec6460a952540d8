"""The fuzzer itself: a short run finds nothing, and a crash is reported so that one can act."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.children import Children
from tests.figures import Tell
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
MINUTES = 0.5
"""For all targets; `make soak` takes longer."""

MIN_INPUTS = 200
"""In the share of one target, on a machine that is busy."""

BREAKS_THE_RULES = """
from nbdstore.protocol.rules import Rules
Rules.judge = lambda self, *args: 33
"""


def run_fuzz(children: Children, *arguments: str, path: Path = ROOT, status: int = 0) -> str:
    return children.run(
        *(sys.executable, "-m", "tests.fuzz", *arguments),
        status=status,
        timeout_s=240,
        env={"PYTHONPATH": f"{path}:{ROOT}"},
    )


def test_a_short_run_finds_nothing(children: Children, tmp_path: Path, tell: Tell) -> None:
    crashes = tmp_path / "crashes"
    output = run_fuzz(children, "--minutes", str(MINUTES), "--crashes", str(crashes))
    done = re.findall(r"^(\w+): (\d+) inputs, (\d+) edges", output, re.MULTILINE)
    assert [target for target, _, _ in done] == list(TARGETS)
    assert all(int(inputs) > MIN_INPUTS for _, inputs, _ in done), output
    assert not crashes.exists()
    n_inputs = sum(int(inputs) for _, inputs, _ in done)
    assert output.splitlines()[-1] == f"{n_inputs:,} inputs, {len(TARGETS)} targets, 0 failed"
    tell("fuzz", {"inputs": n_inputs})


def test_a_crash_is_kept_and_can_be_replayed(children: Children, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BREAKS_THE_RULES)
    crashes = tmp_path / "crashes"
    arguments = ("--target", "requests", "--minutes", "1", "--crashes", str(crashes))
    output = run_fuzz(children, *arguments, path=tmp_path, status=1)
    (kept,) = crashes.iterdir()
    assert f"requests crashed on {kept.read_bytes().hex()}" in output
    (command,) = re.findall(r"^replay: (.*)$", output, re.MULTILINE)
    broken = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    assert "AssertionError" in children.run(*shlex.split(command), env=broken, status=1)
    children.run(*shlex.split(command), env={"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("target", TARGETS)
def test_targets_are_chosen_by_name(children: Children, tmp_path: Path, target: str) -> None:
    (tmp_path / "input").write_bytes(b"\1\2\3")
    run_fuzz(children, "--target", target, "--replay", str(tmp_path / "input"))
