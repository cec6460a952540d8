"""Docker's client library: whether it is there, and its failures as nbdstore's.

Owns the way from its exceptions, and those of the HTTP library below it, to `PlatformError`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

from nbdstore.errors import InvalidArgument, PlatformError


def import_docker() -> ModuleType:
    """Return the client library.

    Raises:
        InvalidArgument: it is not installed.
    """
    try:
        import docker
        import docker.errors
    except ImportError as error:
        raise InvalidArgument(
            "Docker's client library is not installed: pip install 'nbdstore[docker]'"
        ) from error
    return docker


@contextlib.contextmanager
def docker_errors(doing: str) -> Iterator[None]:
    """Turn what the client library raises into PlatformError; `doing` completes "cannot ..."."""
    docker = import_docker()
    import requests.exceptions

    try:
        yield
    except docker.errors.APIError as error:
        raise PlatformError(f"Docker cannot {doing}: {error.explanation or error}") from error
    except docker.errors.DockerException as error:
        raise PlatformError(
            f"cannot {doing}: no Docker engine answers ({error}): is one running, and does "
            "DOCKER_HOST name it?"
        ) from error
    except (requests.exceptions.RequestException, OSError) as error:
        raise PlatformError(
            f"cannot {doing}: the Docker engine went away ({error}): do it again, which completes "
            "what was begun"
        ) from error


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status that a failure of the engine's API came with."""
    docker = import_docker()
    return error.status_code if isinstance(error, docker.errors.APIError) else None


@contextlib.contextmanager
def ignoring_missing() -> Iterator[None]:
    """Let it be if what should be looked at or removed is not there (any more)."""
    try:
        yield
    except PlatformError as error:
        if status_of(error.__cause__) != 404:
            raise
