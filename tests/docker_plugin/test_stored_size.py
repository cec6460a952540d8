"""How large a volume is: asked of the store, which may not answer."""

from __future__ import annotations

import threading
from typing import cast

import pytest

from nbdstore.control.model import VolumeInfo
from nbdstore.control.service import VolumeService
from nbdstore.docker_plugin import stored_size
from nbdstore.docker_plugin.stored_size import StoredSizes
from nbdstore.errors import ControlError
from tests.docker_plugin.memory_store import MemoryStore


class SlowStore(MemoryStore):
    """Answers when it may, and counts the questions."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer = threading.Event()
        self.n_asked = 0

    def volume(self, name: str) -> VolumeInfo:
        self.n_asked += 1
        self.may_answer.wait()
        return super().volume(name)


def sizes_of(store: MemoryStore) -> StoredSizes:
    return StoredSizes(cast("VolumeService", store))


def test_the_size_is_that_of_the_store_now() -> None:
    store = MemoryStore()
    sizes = sizes_of(store)
    assert sizes.of("db") == 0
    store.create_volume("db", 1 << 30)
    assert sizes.of("db") == 1 << 30
    store.update_volume("db", size=2 << 30)
    assert sizes.of("db") == 2 << 30


def test_a_server_that_is_away_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_store: MemoryStore, name: str) -> VolumeInfo:
        raise ControlError(f"no server answers for {name}")

    monkeypatch.setattr(MemoryStore, "volume", refuse)
    assert sizes_of(MemoryStore()).of("db") == 0


def test_a_server_that_does_not_answer_is_asked_one_question_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored_size, "PATIENCE_S", 0.01)
    store = SlowStore()
    store.create_volume("db", 1 << 30)
    sizes = sizes_of(store)
    assert [sizes.of("db") for _ in range(3)] == [0, 0, 0]
    assert store.n_asked == 1
    store.may_answer.set()
    monkeypatch.setattr(stored_size, "PATIENCE_S", 60.0)
    for thread in threading.enumerate():
        if thread.name == "size of db":
            thread.join()
    assert sizes.of("db") == 1 << 30
