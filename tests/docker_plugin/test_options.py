"""What `docker volume create -o` may say."""

from __future__ import annotations

import pytest

from nbdstore.docker_plugin.options import VolumeOptions
from nbdstore.errors import InvalidArgument


def test_all_options() -> None:
    given = {
        "size": "10G",
        "fs": "xfs",
        "clone": "db@nightly",
        "options": "noatime,nodev",
        "owner": "999:999",
        "mode": "2770",
        "iops": "2000",
        "bandwidth": "100M",
    }
    assert VolumeOptions.parse(given) == VolumeOptions(
        size=10 << 30,
        fs="xfs",
        clone="db@nightly",
        options="noatime,nodev",
        owner="999:999",
        mode="2770",
        iops=2000,
        bandwidth=100 << 20,
    )
    assert VolumeOptions.parse({}) == VolumeOptions()


@pytest.mark.parametrize(
    ("key", "text", "match"),
    [
        ("siez", "10G", "no option 'siez': there are bandwidth, clone"),
        ("size", "10GB", "size=10GB: '10GB' is not a size"),
        ("bandwidth", "fast", "bandwidth=fast"),
        ("iops", "-1", "iops=-1: give a number"),
        ("fs", "zfs", "fs=zfs: give ext4 or xfs"),
        ("clone", "db", "clone=db: give VOLUME@SNAPSHOT"),
    ],
)
def test_an_option_that_makes_no_sense(key: str, text: str, match: str) -> None:
    with pytest.raises(InvalidArgument, match=match):
        VolumeOptions.parse({key: text})
