"""What /proc/self/mountinfo says."""

from __future__ import annotations

import pytest

from nbdstore.agent import mounts
from nbdstore.agent.mounts import Mount
from nbdstore.errors import InvalidArgument

MOUNTINFO = r"""22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw
36 22 0:31 / /proc rw shared:5 - proc proc rw
90 22 43:32 / /srv/a\040b\134c ro,relatime shared:9 master:2 propagate_from:1 - xfs /dev/nbd1 rw
91 22 43:32 /sub /mnt rw,relatime master:2 - xfs /dev/nbd1 rw
"""


def test_lines_are_read_with_and_without_optional_fields() -> None:
    found = mounts.parse(MOUNTINFO)
    assert [mount.path for mount in found] == ["/", "/proc", "/srv/a b\\c", "/mnt"]
    assert found[2] == Mount((43, 32), "/", "/srv/a b\\c", "xfs", "/dev/nbd1", True, True)
    assert (found[3].root, found[3].shared, found[3].read_only) == ("/sub", False, False)


@pytest.mark.parametrize("of_filesystem", ["ro,errors=remount-ro", "rw,emergency_ro"])
def test_a_filesystem_that_the_kernel_made_read_only(of_filesystem: str) -> None:
    """The options of the mount itself stay as they were."""
    line = f"90 22 43:32 / /srv rw,relatime - ext4 /dev/nbd1 {of_filesystem}\n"
    (found,) = mounts.parse(line)
    assert found.read_only


def test_a_filesystem_that_would_be_made_read_only_is_not() -> None:
    line = "90 22 43:32 / /srv rw,relatime - ext4 /dev/nbd1 rw,errors=remount-ro\n"
    (found,) = mounts.parse(line)
    assert not found.read_only


def test_this_machine_has_a_root_directory() -> None:
    assert mounts.mounted_at("/") is not None
    assert mounts.mounted_at("/no/such/place") is None


@pytest.mark.parametrize(
    ("path", "reason"),
    [("relative", "absolute path"), ("/", "root directory"), ("/usr/..", "root")],
)
def test_where_nothing_can_be_mounted(path: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        mounts.checked_path(path)
