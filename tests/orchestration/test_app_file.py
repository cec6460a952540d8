"""Applications in YAML: what a file means, and how its mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdstore.errors import InvalidArgument
from nbdstore.orchestration import ContainerApp, Volume
from nbdstore.orchestration.app_file import AppFile, read_app_file

WHOLE = """
name: shop
platform: kubernetes
apps:
  db:
    image: postgres:16
    command: ["postgres", "-c", "max_connections=10"]
    env: {POSTGRES_PASSWORD: secret, LIMIT: 5}
    ports: {15432: 5432}
    replicas: 1
    volumes:
      data: {path: /data, size: 10G, fs: xfs, clone: db@nightly, options: {iops: 2000}}
      logs: {path: /logs, size: 1048576, driver: local, read_only: true}
  web:
    image: web:1
    command: serve --all
    replicas: 3
"""


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "apps.yaml"
    path.write_text(WHOLE)
    data = Volume(
        "data", "/data", size="10G", fs="xfs", clone="db@nightly", options={"iops": "2000"}
    )
    logs = Volume("logs", "/logs", size=1 << 20, driver="local", read_only=True)
    database = ContainerApp(
        "db",
        "postgres:16",
        command=["postgres", "-c", "max_connections=10"],
        volumes=[data, logs],
        env={"POSTGRES_PASSWORD": "secret", "LIMIT": "5"},
        ports={15432: 5432},
    )
    web = ContainerApp("web", "web:1", command="serve --all", replicas=3)
    assert read_app_file(path) == AppFile("shop", "kubernetes", [database, web])


@pytest.mark.parametrize(
    "text",
    [
        *("0770", "0o770", "0x1F", "0b11", "10:10", "1:30:00", "1_000", "+5", "-0", "007", "08"),
        *("1.10", "1e3", "1.", ".5", ".inf", ".nan", "2026-01-02", "=", "5", "-5", "0", "12345678"),
    ],
)
def test_a_text_stays_as_it_was_written(tmp_path: Path, text: str) -> None:
    path = tmp_path / "apps.yaml"
    path.write_text(
        f"name: shop\napps:\n  web:\n    image: web:1\n    command: [chmod, {text}]\n"
        f"    env:\n      A: {text}\n"
    )
    (app,) = read_app_file(path).apps
    assert (app.env, app.words) == ({"A": text}, ["chmod", text])


def test_merged_mappings_and_booleans_are_what_they_are_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "apps.yaml"
    path.write_text(
        "name: shop\napps:\n  one: &one {image: web:1, env: null, volumes: {}}\n"
        "  two:\n    <<: *one\n    volumes: {d: {path: /d, size: 1G, read_only: true}}\n"
    )
    one, two = read_app_file(path).apps
    assert (one.image, one.volumes, two.image) == ("web:1", (), "web:1")
    assert [volume.read_only for volume in two.volumes] == [True]


def test_a_short_file_is_named_by_its_directory_and_for_docker(tmp_path: Path) -> None:
    path = tmp_path / "shop" / "apps.yaml"
    path.parent.mkdir()
    path.write_text("apps: {web: {image: web:1}}")
    assert read_app_file(path) == AppFile("shop", "docker", [ContainerApp("web", "web:1")])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "the file is None: 'key: value' pairs belong there"),
        ("[a]", "the file is"),
        ("apps: {web: {image: web}}\nname: Shop", "'Shop' is no name for a project"),
        ("apps: {web: {image: web}}\nplatfrom: docker", "does not know 'platfrom': it knows apps"),
        ("apps: [web]", "apps is"),
        ("apps: {web: web}", "apps.web is 'web'"),
        ("apps: " + "[" * 5000, "makes no sense as YAML: maximum recursion depth"),
        (
            "apps: {web: {image: web, env: {A: !!timestamp 2001-99-99}}}",
            "makes no sense as YAML: month must",
        ),
        (
            "apps: {web: {image: web, volumes: {d: {path: /d, size: yes}}}}",
            "apps.web.volumes.d.size is True: a text belongs",
        ),
        ("apps: {web: {}}", "apps.web has no image"),
        ("apps: {web: {image: [a]}}", "apps.web.image is"),
        ("apps: {web: {image: web, replica: 2}}", "apps.web does not know 'replica'"),
        ("apps: {web: {image: web, replicas: two}}", "apps.web.replicas is 'two': a number"),
        ("apps: {web: {image: web, replicas: 02}}", "apps.web.replicas is '02': a number"),
        ("apps: {web: {image: web, env: {A: yes}}}", "apps.web.env.A is True: a text belongs"),
        ("apps: {web: {image: web, ports: [80]}}", "apps.web.ports is"),
        ("apps: {web: {image: web, volumes: {d: {size: 1G}}}}", "apps.web.volumes.d has no path"),
        (
            "apps: {web: {image: web, volumes: {d: {path: /d, siez: 1G}}}}",
            "apps.web.volumes.d does not know 'siez'",
        ),
        (
            "apps: {web: {image: web, volumes: {d: {path: /d, size: 1G, read_only: 3}}}}",
            "read_only is 3",
        ),
        ("apps: {Web: {image: web}}", "'Web' is no name for an application"),
        ("apps: {web: [", "is no YAML"),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, text: str, match: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidArgument, match=match) as caught:
        read_app_file(path)
    assert str(path) in str(caught.value)


def write(directory: Path, text: str) -> Path:
    """Write a file, with a name for the project if it has applications and no name."""
    path = directory / "apps.yaml"
    path.write_text(text if "name:" in text or "apps" not in text else f"{text}\nname: shop")
    return path


BOMB = "[lol]"
"""A text of which YAML makes 9 ** 9 others."""
for level in range(9):
    BOMB = f"[&a{level} {BOMB}" + f", *a{level}" * 8 + "]"
LONG = "w" * 1000  # YAML takes no longer keys


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (BOMB, "the file is"),
        (f"apps: {BOMB}", "apps is"),
        (f"apps: {{web: {{image: {BOMB}}}}}", "image is"),
        (f"apps: {{web: {{image: web, command: {BOMB}}}}}", "command is"),
        (f"apps: {{web: {{image: web, replicas: {BOMB}}}}}", "replicas is"),
        (f"apps: {{web: {{image: web, env: {{A: {{B: {BOMB}}}}}}}}}", "env.A is"),
        (
            f"apps: {{web: {{image: web, volumes: {{d: {{path: /, read_only: {BOMB}}}}}}}}}",
            "read_only is",
        ),
        (f"name: {LONG}\napps: {{}}", "is no name for a project"),
        (f"apps: {{{LONG}: []}}", "is no name for an application"),
        (f"apps: {{web: {{image: web, volumes: {{{LONG}: []}}}}}}", "is no name for a volume"),
        (f"apps: {{web: {{image: web, env: {{{LONG}: []}}}}}}", "a text belongs"),
        (f"apps: {{web: {{image: web, env: {{-{LONG}: a}}}}}}", "no name of an environment"),
        (f"apps: {{web: {{image: web, {LONG}: 1}}}}", "does not know"),
        (f'apps: {{web: {{image: web, command: "\'{LONG}"}}}}', "No closing quotation"),
        (f"apps: {{web: {{image: web, replicas: 1{'0' * 4000}}}}}", "replicas: give 0 to 1000"),
        (f"apps: {{web: {{image: web, replicas: !!int 0x1{'0' * 4000}}}}}", "makes no sense"),
        (f"apps: {{web: {{image: !!int 0x1{'0' * 4000}}}}}", "makes no sense"),
    ],
    ids=range(17),
)
def test_a_message_is_short_however_much_a_file_stands_for(
    tmp_path: Path, text: str, match: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidArgument, match=match) as caught:
        read_app_file(path)
    assert len(str(caught.value)) < 400 + len(str(path))


def lengthened(n: int) -> str:
    """Mappings of 1, 2, 3... pairs, each merged into the next."""
    lines = ["x0: &x0 {a: 1}"]
    lines += [f"x{at}: &x{at} {{<<: *x{at - 1}, k{at}: 1}}" for at in range(1, n)]
    return "\n".join(lines)


def widened(n: int) -> str:
    """A mapping of n pairs, merged n times into one."""
    pairs = ", ".join(f"k{at}: 1" for at in range(n))
    return f"x: &x {{{pairs}}}\ny: {{<<: [{', '.join(['*x'] * n)}]}}"


@pytest.mark.parametrize("text", [lengthened(600), widened(400)])
def test_merges_cannot_stand_for_more_than_memory_has(tmp_path: Path, text: str) -> None:
    path = tmp_path / "app.yaml"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=r"app.yaml: .*merges \(<<\) .* than 100000 pairs"):
        read_app_file(path)


def test_a_file_may_be_endless() -> None:
    with pytest.raises(InvalidArgument, match="'/dev/zero' is larger than 1 MiB"):
        read_app_file(Path("/dev/zero"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"none\.yaml': No such file"):
        read_app_file(tmp_path / "none.yaml")
