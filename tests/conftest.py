"""What every test can rely on: children that never outlive it, and no silent skips.

- ``children`` starts programs for one test. Each is killed when the test ends, however it ends;
  what a program logged is shown when the test fails or times out.
- ``guest`` is a virtual machine, for tests that need a kernel with nbd; see tests/guest/guest.py.
- ``@pytest.mark.requires("qemu-io", "/dev/fuse", "root")`` names what a machine must have. A test
  whose machine lacks it does not run, and the end of the report says which and why; with CI=true
  such a test makes the whole run fail.
- ``tell`` takes figures, which are summed up at the end of the report; see tests/figures.py.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests import figures
from tests.children import Children
from tests.figures import Tell
from tests.guest.guest import Guest
from tests.guest.kernel import KernelError, fetch_kernel

PACKAGES_FILE = Path(__file__).parent / "debian-packages.txt"
# Programs for the administrator lie here, and are not in every user's PATH.
ADMIN_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")

LOGS: pytest.StashKey[Children] = pytest.StashKey()
LOG_TAIL_BYTES = 16 << 10


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "requires(*names): programs, paths or 'root', without which a test cannot run"
    )
    missing = [path for path in ADMIN_DIRECTORIES if path not in os.environ["PATH"].split(":")]
    os.environ["PATH"] = ":".join([os.environ["PATH"], *missing])


# --- What a machine must have --------------------------------------------------------------------


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("requires"):
        for name in marker.args:
            if reason := why_missing(name):
                pytest.skip(reason)


def why_missing(name: str) -> str | None:
    """Say why ``name`` cannot be had on this machine; None if it can."""
    if name == "root":
        return None if os.geteuid() == 0 else "needs root"
    if name.startswith("/"):
        return None if os.access(name, os.R_OK) else f"needs {name}"
    if shutil.which(name):
        return None
    package = packages_by_program().get(name)
    return f"needs {name}" + (f" (Debian package {package})" if package else "")


def packages_by_program() -> dict[str, str]:
    """Read which Debian package brings which program from the list that installs them."""
    lines = re.findall(r"^([\w.+-]+)\s+#(.*)$", PACKAGES_FILE.read_text(), re.MULTILINE)
    return {program: package for package, programs in lines for program in programs.split()}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures.show(terminalreporter)
    skipped = not_run(terminalreporter)
    if not skipped:
        return
    terminalreporter.section("not run on this machine", red=True, bold=True)
    for name, reason in skipped:
        terminalreporter.line(f"{name}: {reason}")
    if in_ci():
        terminalreporter.line("In CI all tests must run: this run has failed.", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and in_ci() and not_run(reporter) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def not_run(reporter: pytest.TerminalReporter) -> list[tuple[str, str]]:
    """List (test, reason) of all that was skipped, by every process of the run."""
    skipped = []
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        skipped.append((report.nodeid, str(reason).removeprefix("Skipped: ")))
    return sorted(skipped)


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


# --- Children -------------------------------------------------------------------------------------


@pytest.fixture
def children(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Children]:
    """Programs started for this test; killed when it ends."""
    with Children(tmp_path) as children:
        request.node.stash[LOGS] = children
        yield children


@pytest.fixture
def guest(children: Children, tmp_path: Path) -> Iterator[Guest]:
    """A booted guest of this test's own; see tests.guest.guest."""
    try:
        fetch_kernel()
    except KernelError as error:
        pytest.skip(f"no kernel for the guest: {error}")
    with Guest(children, tmp_path) as guest:
        yield guest


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    """Takes what a test came to; see tests.figures."""
    return figures.teller(record_property)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and LOGS in item.stash:
        for path in item.stash[LOGS].logs:
            report.sections.append((f"{path.name} (end)", tail(path)))
    return report


def tail(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")
