"""What applications and volumes are refused, and how replicas and volumes are named."""

from __future__ import annotations

from typing import Any

import pytest

from nbdstore.errors import AlreadyExists, InvalidArgument, NotFound
from nbdstore.orchestration import ContainerApp, Orchestration, Volume
from nbdstore.orchestration.app import replica_name, volume_name
from nbdstore.orchestration.platform import open_platform
from tests.orchestration.remembering_platform import RememberingPlatform

VOLUME = Volume("data", "/data", size="10G")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"name": "Web"}, "'Web' is no name"),
        ({"name": "w" * 41}, "is no name"),
        ({"name": "-w"}, "is no name"),
        ({"name": "1w"}, "beginning with a letter"),
        ({"image": ""}, "is no image"),
        ({"replicas": -1}, "cannot have -1 replicas: give 0 to 1000"),
        ({"replicas": 1001}, "cannot have 1001 replicas: give 0 to 1000"),
        ({"ports": {0: 80}}, "0 is no port"),
        ({"ports": {80: 65536}}, "65536 is no port"),
        ({"command": "sh -c 'echo"}, "No closing quotation"),
        ({"command": ["sh", "a\0b"]}, "holds a zero byte"),
        ({"env": {"A": "\0"}}, "holds a zero byte"),
        ({"env": {"A-B": "1"}}, "'A-B' is no name of an environment variable"),
        ({"volumes": [VOLUME, Volume("data", "/b", size=1)]}, "two volumes with the name 'data'"),
        ({"volumes": [VOLUME, Volume("b", "/data", size=1)]}, "two volumes with the path '/data'"),
    ],
)
def test_an_application_that_makes_no_sense(words: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgument, match=match):
        ContainerApp(**{"name": "web", "image": "web:1", **words})


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"name": "Data"}, "'Data' is no name"),
        ({"path": "data"}, "'data' is no path"),
        ({"path": "/data:ro"}, "'/data:ro' is no path"),
        ({"size": "10GB"}, "'10GB' is not a size"),
        ({"size": -1}, "has no size"),
        ({"size": 0}, "has no size: give one, such as size='10G'"),
    ],
)
def test_a_volume_that_makes_no_sense(words: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgument, match=match):
        Volume(**{"name": "data", "path": "/data", "size": "1G", **words})


def test_a_clone_has_the_size_of_its_origin() -> None:
    assert Volume("data", "/data", clone="db@nightly").size_bytes == 0


def test_a_command_is_words_or_as_a_shell_reads_it() -> None:
    assert ContainerApp("a", "b", command="sh -c 'echo a'").words == ["sh", "-c", "echo a"]
    assert ContainerApp("a", "b", command=["sh", "-c", "echo a"]).words == ["sh", "-c", "echo a"]
    assert ContainerApp("a", "b").words == []


def test_names() -> None:
    assert replica_name("shop", "db", 0) == "shop-db-0"
    assert volume_name("shop", "db", "data", 1) == "shop-db-data-1"


def test_names_that_are_too_long_together() -> None:
    shop = Orchestration(RememberingPlatform(), name="s" * 30)
    with pytest.raises(InvalidArgument, match="more than 63 characters: choose shorter names"):
        shop.add_container_app(ContainerApp("d" * 30, "db:1", volumes=[VOLUME]))


def test_an_application_is_added_once_and_before_it_is_scaled() -> None:
    shop = Orchestration(RememberingPlatform())
    shop.add_container_app(ContainerApp("db", "db:1"))
    with pytest.raises(AlreadyExists, match="two applications 'db'"):
        shop.add_container_app(ContainerApp("db", "db:2"))
    with pytest.raises(NotFound, match="no application 'web'"):
        shop.scale("web", 2)


@pytest.mark.parametrize(
    ("one", "two", "match"),
    [
        (
            ContainerApp("db", "db:1", volumes=[Volume("a-b", "/a", size="1G")], replicas=0),
            ContainerApp("db-a", "db:1", volumes=[Volume("b", "/b", size="1G")]),
            "both have the volume 'shop-db-a-b-0': rename one of them, or its volume",
        ),
        (
            ContainerApp("shop-b", "db:1", volumes=[Volume("x", "/x", size="1G")]),
            ContainerApp("b", "db:1", volumes=[Volume("x-shop", "/x", size="1G")]),
            "both have the PersistentVolumeClaim 'x-shop-shop-b-0'",
        ),
        (
            ContainerApp("db", "db:1", volumes=[VOLUME]),
            ContainerApp("db-replicas", "db:1", ports={80: 80}),
            "both have the Service 'shop-db-replicas'",
        ),
    ],
    ids=["volume", "claim", "service"],
)
@pytest.mark.parametrize("turned", [False, True])
def test_two_applications_do_not_share_what_is_made_for_each(
    one: ContainerApp, two: ContainerApp, match: str, turned: bool
) -> None:
    shop = Orchestration(RememberingPlatform(), name="shop")
    first, second = (two, one) if turned else (one, two)
    shop.add_container_app(first)
    with pytest.raises(InvalidArgument, match=match) as caught:
        shop.add_container_app(second)
    assert str(caught.value).startswith(f"applications '{first.name}' and '{second.name}' would ")
    assert list(shop.apps) == [first.name]


def test_names_that_only_look_alike_are_taken() -> None:
    shop = Orchestration(RememberingPlatform(), name="shop")
    for name in ("db", "db-a", "db-data", "db-replicas"):
        shop.add_container_app(ContainerApp(name, "db:1", volumes=[VOLUME]))
    assert len(shop.apps) == 4


def test_a_scale_that_fails_changes_nothing() -> None:
    platform = RememberingPlatform()
    shop = Orchestration(platform)
    shop.add_container_app(ContainerApp("db", "db:1"))
    platform.failure = InvalidArgument("no")
    with pytest.raises(InvalidArgument):
        shop.scale("db", 2)
    platform.failure = None
    shop.start()
    assert [app.replicas for app in platform.applied] == [1]


def test_there_are_two_platforms() -> None:
    with pytest.raises(InvalidArgument, match="no platform 'nomad': choose docker or kubernetes"):
        open_platform("nomad")
