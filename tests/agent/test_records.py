"""Records: durable, replaced as a whole, for their owner only, of one process at a time."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from nbdstore.agent.records import (
    AttachRecord,
    FilesystemRecord,
    MountRecord,
    Records,
    new_id,
    write_durably,
)
from nbdstore.errors import Busy, DeviceError

RECORD = AttachRecord(
    id="0123456789abcdef",
    volume="db",
    volume_uuid="u",
    driver="kernel",
    created="2026-01-02T03:04:05+00:00",
    export="db,lease=3-secret",
    epoch=3,
    address="127.0.0.1:10809",
    size=4096,
    flags=1,
    request_timeout_s=10,
    dead_timeout_s=3600,
    sockets=(1, 2),
    filesystem=FilesystemRecord(type="ext4", made="begun", owner="1:2"),
    mounts=(MountRecord(path="/srv/db", options="noatime", fsck="never", by="test"),),
)


def test_records_come_back(tmp_path: Path) -> None:
    records = Records.open(tmp_path / "state")
    agent_id = records.agent_id
    records.save(RECORD)
    other = dataclasses.replace(RECORD, id=new_id(), volume="web", filesystem=None, mounts=())
    records.save(other)
    records.save(dataclasses.replace(RECORD, state="detaching"))
    records.close()

    records = Records.open(tmp_path / "state")
    assert records.agent_id == agent_id
    found = {record.volume: record for record in records.load()}
    assert found == {"db": dataclasses.replace(RECORD, state="detaching"), "web": other}
    records.remove(other)
    records.remove(other)
    assert [record.volume for record in records.load()] == ["db"]
    records.close()


def test_only_the_owner_can_read_them(tmp_path: Path) -> None:
    os.umask(0o022)
    records = Records.open(tmp_path / "state")
    records.save(RECORD)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert records.path(RECORD).stat().st_mode & 0o777 == 0o600
    records.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    records = Records.open(tmp_path)
    with pytest.raises(Busy, match="another agent"):
        Records.open(tmp_path)
    records.close()
    Records.open(tmp_path).close()


def test_what_was_being_written_at_a_crash_is_removed(tmp_path: Path) -> None:
    records = Records.open(tmp_path)
    records.save(RECORD)
    unfinished = records.path(RECORD).with_suffix(".new")
    unfinished.write_text('{"version": 1, "id')
    assert records.load() == [RECORD]
    assert not unfinished.exists()
    records.close()


def test_a_record_is_synced_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that was renamed unsynced, a power cut can leave nothing but its name."""
    calls: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        real_fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        calls.append(f"rename to {target.name}")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    write_durably(tmp_path / "x.json", {"a": 1})
    assert calls == ["sync x.new", "rename to x.json", f"sync {tmp_path.name}"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 3}',
        '{"version": 2, "id": "x"}',
        '{"version": 2, "mounts": [{}]}',
        '{"version": 2, "mounts": ["/srv/db"]}',
        '{"version": 2, "filesystem": "ext4"}',
    ],
)
def test_a_record_that_makes_no_sense_is_not_guessed_at(tmp_path: Path, text: str) -> None:
    records = Records.open(tmp_path)
    (tmp_path / "attachments" / "x.json").write_text(text)
    with pytest.raises(DeviceError, match=r"x\.json cannot be read"):
        records.load()
    records.close()


def test_members_that_are_not_known_are_ignored() -> None:
    newer = json.loads(json.dumps(RECORD.to_json() | {"colour": "blue"}))
    for member in (newer["mounts"][0], newer["filesystem"]):
        member["colour"] = "red"
    assert AttachRecord.from_json(newer) == RECORD


def test_a_record_of_version_1_is_read_and_written_as_one_of_version_2(tmp_path: Path) -> None:
    """Its filesystem had an fsck that nothing read, its mounts had none."""
    older = json.loads(json.dumps(RECORD.to_json() | {"version": 1}))
    older["filesystem"]["fsck"] = "repair"
    del older["mounts"][0]["fsck"]
    records = Records.open(tmp_path)
    records.path(RECORD).write_text(json.dumps(older))
    (found,) = records.load()
    mount = dataclasses.replace(RECORD.mounts[0], fsck="auto")
    assert found == dataclasses.replace(RECORD, mounts=(mount,))
    records.save(found)
    assert json.loads(records.path(RECORD).read_text())["version"] == 2
    assert records.load() == [found]
    records.close()
