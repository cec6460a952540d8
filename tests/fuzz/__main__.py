"""Fuzz the protocol: ``python -m tests.fuzz --seed N --minutes M [--target T]``.

Each target gets its share of the time, in a process of its own, and begins with its corpus. A crash
is written to a file, with the command that replays it, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.targets import TARGETS, corpus_of, keep, unpack

INPUT_BYTES = 600
INPUT_TIMEOUT_S = 30
MEMORY_MIB = 1024
GRACE_S = 120.0
"""How much longer than it was told libFuzzer may run before it is taken to hang."""

OK, CRASHED, UNUSABLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(arguments)
    if options.replay:
        return replay(options.replay, options.target)
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: atheris is missing: pip install atheris (CPython on Linux)", file=sys.stderr)
        return UNUSABLE
    targets = options.target or list(TARGETS)
    share_s = max(1, round(options.minutes * 60 / len(targets)))
    done = [
        fuzz(target, options.seed, share_s, options.crashes, keep_new=options.keep)
        for target in targets
    ]
    n_inputs, n_failed = sum(n for n, _ in done), sum(not well for _, well in done)
    print(f"{n_inputs:,} inputs, {len(targets)} targets, {n_failed} failed", flush=True)
    return CRASHED if n_failed else OK


def fuzz(
    target: str, seed: int, seconds: int, crashes: Path, *, keep_new: bool
) -> tuple[int, bool]:
    """Fuzz one target; return how many inputs were run, and whether nothing was found."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        new, old, log = (Path(scratch, name) for name in ("new", "old", "log"))
        new.mkdir()
        unpack(corpus_of(target), old)
        found = Path(scratch, "crash-")
        started = time.monotonic()
        status = guided(
            *(target, f"-seed={seed or 1}", f"-max_total_time={seconds}"),
            *(f"-max_len={INPUT_BYTES}", f"-timeout={INPUT_TIMEOUT_S}"),
            *(f"-rss_limit_mb={MEMORY_MIB}", f"-artifact_prefix={found}", "-print_final_stats=1"),
            *(str(new), str(old)),
            log=log,
            timeout_s=seconds + GRACE_S,
        )
        took_s = time.monotonic() - started
        print(f"{target}: {summary(log)}, {took_s:.0f} s, seed {seed}", flush=True)
        if status == 0:
            if keep_new:
                minimise(target, [old, new], Path(scratch))
            return n_executed(log), True
        report(target, log, sorted(Path(scratch).glob("crash-*")), crashes)
        return n_executed(log), False


def guided(*arguments: str, log: Path, timeout_s: float) -> int:
    """Run libFuzzer on a target, its output in a file; return its exit status."""
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.guided", *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=timeout_s,
        )
    return done.returncode


def n_executed(log: Path) -> int:
    """How many inputs libFuzzer ran; 0 if it ended without telling."""
    text = log.read_text(errors="replace")
    return int((re.findall(r"stat::number_of_executed_units:\s*(\d+)", text) or [0])[-1])


def summary(log: Path) -> str:
    """What libFuzzer did, in a few words."""
    reached = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log.read_text(errors="replace"))
    n_inputs = n_executed(log)
    if not n_inputs or not reached:
        return "ended early"
    edges, features, size = reached[-1]
    return f"{n_inputs} inputs, {edges} edges, {features} features, a corpus of {size}"


def report(target: str, log: Path, found: Sequence[Path], crashes: Path) -> None:
    """Keep what crashed, and say how to see it again."""
    print(log.read_text(errors="replace")[-4000:])
    if not found:
        print(f"fuzz: {target} ended without saying why")
    crashes.mkdir(parents=True, exist_ok=True)
    for path in found:
        kept = crashes / f"{target}-{path.name}"
        kept.write_bytes(path.read_bytes())
        print(f"fuzz: {target} crashed on {path.read_bytes().hex()}")
        print(f"replay: {sys.executable} -m tests.fuzz --target {target} --replay {kept}")


def minimise(target: str, corpora: Sequence[Path], scratch: Path) -> None:
    """Rewrite a target's corpus with the fewest inputs that reach what all of them reach."""
    chosen = scratch / "chosen"
    chosen.mkdir()
    status = guided(
        *(target, "-set_cover_merge=1", str(chosen), *map(str, corpora)),
        log=scratch / "merge.log",
        timeout_s=GRACE_S * 5,
    )
    if status:
        raise SystemExit((scratch / "merge.log").read_text(errors="replace")[-4000:])
    kept = [path.read_bytes() for path in chosen.iterdir()]
    keep(target, kept)
    print(f"{target}: {len(kept)} inputs kept, {sum(map(len, kept))} bytes")


def replay(path: Path, targets: Sequence[str] | None) -> int:
    """Run one input as it was; whatever is wrong shows itself as an exception."""
    for target in targets or TARGETS:
        TARGETS[target](path.read_bytes())
    return OK


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Fuzz the protocol, guided by coverage."
    )
    add = parser.add_argument
    add("--seed", type=int, default=1, help="of libFuzzer's mutations (%(default)s)")
    add("--minutes", type=float, default=1.0, help="for all targets together (%(default)g)")
    add("--target", action="append", choices=list(TARGETS), help="only this; may be repeated")
    add("--crashes", type=Path, default=Path("fuzz-crashes"), help="where crashes go")
    add("--keep", action="store_true", help="add to the corpus what was reached, and minimise it")
    add("--replay", type=Path, metavar="FILE", help="run one input, and nothing else")
    return parser


if __name__ == "__main__":
    sys.exit(main())
