"""docs/agent.md is true: its commands run, and print what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdstore.agent.requests import AttachmentStatus
from tests.agent.host import Host
from tests.test_readme import Step, fits, steps

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "agent.md").read_text()

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


SHOWN_BY = {
    1: "agent/test_agent.py: test_a_volume_that_holds_data_is_never_formatted",
    2: "agent/test_recovery.py: test_io_waits_for_a_server_that_was_killed_and_needs_no_agent",
    3: "agent/test_guest.py: test_io_goes_on_through_kills_outages_and_growth",
    4: "agent/test_guest.py: test_two_hosts",
    5: "clients/test_leases.py: test_a_fenced_client_s_writes_never_land",
    6: "agent/test_recovery.py: test_a_volume_has_one_host_and_force_fences_the_other",
    7: "agent/test_guest.py: test_what_one_process_can_do",
    8: "clients/test_snapshots.py: test_a_deleted_volume_comes_back_with_its_snapshots",
    9: "agent/test_agent.py: test_a_new_volume_is_formatted_once_and_mounted_again_as_it_is",
    10: "docker/test_plugin.py: test_a_pool_that_is_full_holds_writes_until_there_is_space",
    11: "agent/test_agent.py: test_a_repair_leaves_a_snapshot_of_what_was_there_before",
    12: "agent/test_recovery.py: test_another_volume_of_that_name_is_not_attached",
    13: "docker/test_plugin.py: test_a_mount_is_shared_on_a_machine_and_survives_every_restart",
    14: "agent/test_kills.py: test_what_follows_a_mount_is_done_once_by_whoever_comes",
    15: "agent/test_agent.py: test_a_filesystem_that_cannot_grow_is_mounted_as_it_is",
    16: "clients/test_limits.py: test_changed_while_a_client_waits",
    17: "clients/test_backup.py: test_three_increments_between_two_servers",
    18: "cli/test_scrub.py: test_damage",
    19: "store/test_snapshots.py: test_space_comes_back_in_any_order_of_deletion",
    20: "cli/test_connections.py: test_a_table",
    21: "agent/test_attachments.py: test_who_comes_meanwhile_waits_a_little",
    22: "agent/test_recovery.py: test_what_would_wait_for_a_server_is_refused_and_force_ends_it",
    23: "docker/test_plugin.py: test_a_volume_is_made_formatted_and_kept",
    24: "cli/test_salvage.py: test_all_volumes_come_out_and_what_is_lost_is_told",
}
"""The complaints, and a test of each answer."""


def test_every_complaint_is_answered_and_the_answer_tested() -> None:
    rows = [line for line in DOCS.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [int(row.split("|")[1]) for row in rows] == list(SHOWN_BY) == list(range(1, 25))
    for place in SHOWN_BY.values():
        file, _, name = place.partition(": ")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), place
