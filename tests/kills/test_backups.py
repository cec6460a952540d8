"""`kill -9` amid a send, a receive, or both: see tests.kills.backups."""

from __future__ import annotations

import random
from pathlib import Path

from tests.children import Children
from tests.figures import Tell
from tests.kills.backups import BackupKills

ROUNDS = 3
SEED = 5
SIZE = 24 << 20


def test_backups_arrive_whoever_is_killed(children: Children, tmp_path: Path, tell: Tell) -> None:
    kills = BackupKills(children, tmp_path, random.Random(SEED), SIZE)
    for _ in range(ROUNDS):
        kills.round()
    kills.close()
    assert kills.figures["kills"] >= 2
    tell("backup-kills", kills.figures)
