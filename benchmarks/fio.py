"""Load from fio: its job files, changed where a row wants it, run, and read.

The jobs in fio/ are whole: anybody can run one without this harness. Here options of their
``[global]`` section are replaced, such as the runtime.
"""

from __future__ import annotations

import configparser
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.model import BenchmarkFailed, Sample, Stage, Transport, Unit
from benchmarks.server import Server
from benchmarks.tools import Tools
from tests.children import Children, CommandError

JOBS: Final = Path(__file__).parent / "fio"
TIMEOUT_S: Final = 600.0
_DIRECTIONS: Final = ("read", "write", "trim")
_NOBODY: Final = "65534"

Options = Mapping[str, str | None]
"""Options of fio by name: None takes the option out, the empty string is a bare flag."""


@dataclass(frozen=True)
class Result:
    """What fio tells of all jobs of a run together.

    Attributes:
        operations: completed reads, writes and trims.
        iops, bytes_per_s: of reads, writes and trims.
        p50_us, p99_us: completion latency, of the direction that had more operations.
    """

    operations: int
    iops: float
    bytes_per_s: float
    p50_us: float
    p99_us: float


def job_text(name: str, options: Options) -> str:
    """The job file `name` with `options` in its ``[global]`` section."""
    parser = configparser.ConfigParser(
        delimiters=("=",), allow_no_value=True, interpolation=None, default_section="none"
    )
    parser.read_string((JOBS / f"{name}.fio").read_text())
    for option, value in options.items():
        if value is None:
            parser.remove_option("global", option)
        else:
            parser.set("global", option, value or None)
    text = io.StringIO()
    parser.write(text, space_around_delimiters=False)
    return text.getvalue()


def split(output: str) -> tuple[str, str]:
    """Tell fio's JSON from its words, which go before or behind it; either may be empty."""
    start = output.find("{\n")
    if start < 0:
        return "", f"fio: {output.strip()[-400:]}"
    end = output.rfind("\n}") + 2
    return output[start:end], f"fio: {(output[:start] + output[end:]).strip()[-400:]}"


def parse(output: str) -> Result:
    """Read fio's JSON, which other words may surround.

    Raises:
        BenchmarkFailed: fio met errors, or there is no JSON.
    """
    figures, words = split(output)
    try:
        jobs: list[Any] = json.loads(figures)["jobs"] if figures else []
    except ValueError as error:
        raise BenchmarkFailed(f"fio's JSON cannot be read: {error}; {words}") from error
    if not jobs or any(job["error"] for job in jobs):
        raise BenchmarkFailed(words)
    sides = [job[direction] for job in jobs for direction in _DIRECTIONS]
    busiest = max(sides, key=lambda side: int(side["total_ios"]))
    if not busiest["total_ios"]:
        raise BenchmarkFailed(f"no operation was completed; {words}")
    percentiles = busiest["clat_ns"].get("percentile", {})
    return Result(
        operations=sum(side["total_ios"] for side in sides),
        iops=sum(side["iops"] for side in sides),
        bytes_per_s=sum(side["bw_bytes"] for side in sides),
        p50_us=percentiles.get("50.000000", 0) / 1000,
        p99_us=percentiles.get("99.000000", 0) / 1000,
    )


def run(
    children: Children, name: str, options: Options, *, env: Mapping[str, str], as_nobody: bool
) -> Result:
    """Run a job to its end.

    Arguments:
        env: variables that the job file names (URI), and others.
        as_nobody: give up root, for which libnbd would look for certificates in /etc only.
    """
    drop = ["setpriv", "--pdeathsig=KILL", "--clear-groups"]
    drop += [f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--"]
    try:
        output = children.run(
            *(drop if as_nobody else []),
            *("fio", "--output-format=json", "-"),
            timeout_s=TIMEOUT_S,
            env=env,
            stdin=job_text(name, options),
        )
    except CommandError as error:
        raise BenchmarkFailed(split(error.output)[1]) from error
    return parse(output)


def milliseconds(seconds: float) -> str:
    """A time as fio reads it."""
    return f"{round(seconds * 1000)}ms"


@dataclass(frozen=True)
class FioJob:
    """Measure with a job of fio's NBD engine.

    Attributes:
        unit: IOPS or MB_PER_S.
        is_scattered: the job goes for the blocks that Filling.SCATTERED has written.
    """

    job: str
    unit: Unit = Unit.IOPS
    is_scattered: bool = False

    def __call__(self, server: Server, stage: Stage, tools: Tools) -> Sample:
        options = {"runtime": milliseconds(tools.runtime_s)}
        if self.is_scattered:
            options["blockalign"] = str(stage.spacing_bytes)
        before_s = server.cpu_s()
        result = run_nbd(server, self.job, options, tools)
        return sample(result, self.unit, server.cpu_s() - before_s)


def run_nbd(server: Server, job: str, options: Options, tools: Tools) -> Result:
    """Run a job on a server's first volume."""
    is_tls = server.transport is Transport.TLS
    env = {"URI": server.uri()}
    if is_tls:
        env["HOME"] = str(tools.pki_home)
    as_nobody = is_tls and os.geteuid() == 0
    return run(tools.children, job, options, env=env, as_nobody=as_nobody)


def sample(result: Result, unit: Unit, server_cpu_s: float) -> Sample:
    """A result as a sample in `unit`."""
    return Sample(
        value=result.bytes_per_s / 1e6 if unit is Unit.MB_PER_S else result.iops,
        operations=result.operations,
        server_cpu_s=server_cpu_s,
        details={"p50 us": result.p50_us, "p99 us": result.p99_us},
    )
