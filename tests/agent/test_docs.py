"""docs/agent.md is true: its commands run, and print what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdstore.agent.requests import AttachmentStatus
from tests.agent.host import Host
from tests.test_readme import Step, fits, steps

DOCS = (Path(__file__).parents[2] / "docs" / "agent.md").read_text()

pytestmark = [
    pytest.mark.requires("root", "/dev/fuse", "/dev/loop-control", "nbdfuse", "fusermount3"),
    pytest.mark.requires("losetup", "mount", "mkfs.ext4", "setsid"),
    pytest.mark.timeout(180),
]


def perform(host: Host, step: Step) -> str:
    """Do what a step says, on a machine that has directories of its own, and return the output."""
    if step.command.startswith("export NBDSTORE_SERVER="):
        return ""  # it is in the environment, as where the agent's own files are
    if step.command == "nbdstore agent &":
        host.start()
        return ""
    if step.command == "kill %1":
        host.stop()
        return ""
    command = step.command.replace("/srv/", f"{host.directory}/")
    output = host.children.run("bash", "-c", f"PATH={host.scripts}:$PATH; {command}", env=host.env)
    lines = output.replace(f"{host.directory}/", "/srv/").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("nbdstore: attached by nbdfuse"))


def test_the_commands_print_what_the_page_says(host: Host) -> None:
    found = list(steps(DOCS))
    assert len(found) == 10
    for step in found:
        output = perform(host, step)
        assert not step.output or fits(step.output, output), (
            f"{step.command}\nprints:\n{output}\nThe page says:\n{step.output}"
        )


@pytest.mark.parametrize(
    "state", ["attached", "waiting", "fenced", "failed", "absent", "detaching"]
)
def test_every_state_is_explained(state: str) -> None:
    assert f"| `{state}` |" in DOCS
    assert f'"{state}"' in (AttachmentStatus.__doc__ or "")


def test_every_complaint_is_answered() -> None:
    rows = [line for line in DOCS.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 25))
