"""What the tests with a Docker engine share: an engine and its storage, for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.children import Children
from tests.docker.engine import Engine, running_engine
from tests.docker.storage import Storage


@pytest.fixture(scope="module")
def module_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with running_engine(tmp_path_factory.mktemp("engine")) as engine:
        yield engine


@pytest.fixture
def engine(module_engine: Engine, children: Children) -> Engine:
    """A running Docker engine that has no containers, volumes and networks of other tests."""
    module_engine.remove_all()
    children.logs += module_engine.children.logs
    return module_engine


@pytest.fixture(scope="module")
def module_storage(
    module_engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Storage]:
    with Storage(module_engine, tmp_path_factory.mktemp("storage")) as storage:
        yield storage


@pytest.fixture
def storage(module_storage: Storage, engine: Engine) -> Storage:
    """A server, an agent and the plugin beside the engine; no volumes."""
    return module_storage
