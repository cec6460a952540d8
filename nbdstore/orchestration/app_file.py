"""Applications from a YAML file, with every mistake named by its place.

The format, of which only `apps` and each application's `image` must be there::

    name: shop                    # of the project; the directory's name without it
    platform: docker              # or kubernetes
    apps:
      db:
        image: postgres:16
        command: ["postgres", "-c", "fsync=on"]      # or one text
        env: {POSTGRES_PASSWORD: secret}
        ports: {5432: 5432}       # outside: inside
        replicas: 1
        volumes:
          data: {path: /var/lib/postgresql/data, size: 10G, fs: xfs}

A volume's keys are the arguments of `Volume`.

Plain decimal numbers are numbers; all else that YAML takes for one is the text that was written,
quotes or not: a mode 0770, a user 10:10 and a version 1.10 stay what they are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from nbdstore.errors import InvalidArgument
from nbdstore.orchestration.app import NAME, ContainerApp, Volume, checked_name, shown
from nbdstore.sizes import format_size

DEFAULT_PLATFORM: Final = "docker"
DECIMAL: Final = re.compile(r"(0|-?[1-9][0-9]*)\Z", re.ASCII)
"""What is a number; each has one way to be written, so as a text it is what was written."""
MAX_BYTES: Final = 1 << 20
"""Of a file: a hundred times what is sensible."""
MAX_PAIRS: Final = 100_000
"""Of all mappings of a file, with what merges (<<) bring in: each may add to what the one before
has, or double it (PyYAML before 6.0.4), so that a short file would take all memory."""
KEPT_TAGS: Final = ("bool", "null", "merge")
"""What else unquoted text may be in YAML 1.1; not float, int as it is there, timestamp, value."""


@dataclasses.dataclass(frozen=True)
class AppFile:
    """What a file says."""

    name: str
    platform: str
    apps: list[ContainerApp]


def read_app_file(path: Path) -> AppFile:
    """Read a file.

    Raises:
        InvalidArgument: it cannot be read, is no YAML, or says what makes no sense: where, what.
    """
    try:
        import yaml
    except ImportError as error:
        raise InvalidArgument(
            "YAML cannot be read without its library: pip install 'nbdstore[docker]'"
        ) from error
    try:
        text = _text_of(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InvalidArgument(f"cannot read '{path}': {reason}") from error
    try:
        document = yaml.load(text, Loader=_loader(yaml))
        return parse(document, default_name=path.absolute().parent.name)
    except yaml.YAMLError as error:
        raise InvalidArgument(f"'{path}' is no YAML: {error}") from error
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error}") from error
    # A date that is none, a hundred brackets, a number that is too long to be written.
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"'{path}' makes no sense as YAML: {error}") from error


def _text_of(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise InvalidArgument(
            f"'{path}' is larger than {format_size(MAX_BYTES)}, as no file of applications is: "
            "give another, or take a part of it"
        )
    return text


def _loader(yaml: ModuleType) -> Any:
    """Return a SafeLoader that leaves texts as they were written, and bounds merges."""
    base: Any = yaml.SafeLoader
    n_pairs = 0

    def flatten_mapping(self: Any, node: Any) -> None:
        # Called for a mapping, and for each that is merged into it before that is copied.
        nonlocal n_pairs
        base.flatten_mapping(self, node)
        n_pairs += len(node.value)
        if n_pairs > MAX_PAIRS:
            raise InvalidArgument(
                f"its mappings and merges (<<) stand for more than {MAX_PAIRS} pairs: merge less"
            )

    loader: Any = type("AppFileLoader", (base,), {"flatten_mapping": flatten_mapping})
    tags = {f"tag:yaml.org,2002:{name}" for name in KEPT_TAGS}
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in tags]
        for first, resolvers in base.yaml_implicit_resolvers.items()
    }
    loader.add_implicit_resolver("tag:yaml.org,2002:int", DECIMAL, list("-0123456789"))
    return loader


def parse(document: object, *, default_name: str) -> AppFile:
    """Build the applications from a file's content; see `read_app_file`."""
    top = _mapping(document, "the file", {"name", "platform", "apps"})
    apps = _mapping(top.get("apps"), "apps", None)
    name = _text(top.get("name", default_name), "name")
    if not NAME.fullmatch(name):
        raise InvalidArgument(
            f"{shown(name)} is no name for a project: say 'name: NAME', with lower-case letters, "
            "digits and '-'"
        )
    return AppFile(
        name,
        _text(top.get("platform", DEFAULT_PLATFORM), "platform"),
        [_app(_name(name, "an application"), it, f"apps.{name}") for name, it in apps.items()],
    )


def _app(name: str, value: object, where: str) -> ContainerApp:
    known = {field.name for field in dataclasses.fields(ContainerApp)} - {"name"}
    given = _mapping(value, where, known)
    if "image" not in given:
        raise InvalidArgument(f"{where} has no image: say which, as in 'image: postgres:16'")
    volumes = _mapping(given.get("volumes") or {}, f"{where}.volumes", None)
    return ContainerApp(
        name,
        _text(given["image"], f"{where}.image"),
        command=_command(given.get("command", ""), f"{where}.command"),
        volumes=[
            _volume(_name(key, "a volume"), item, f"{where}.volumes.{key}")
            for key, item in volumes.items()
        ],
        env={
            str(key): _text(item, f"{where}.env.{key!s:.60}")
            for key, item in _mapping(given.get("env") or {}, f"{where}.env", None).items()
        },
        ports={
            _number(key, f"{where}.ports"): _number(item, f"{where}.ports.{key}")
            for key, item in _mapping(given.get("ports") or {}, f"{where}.ports", None).items()
        },
        replicas=_number(given.get("replicas", 1), f"{where}.replicas"),
    )


def _volume(name: str, value: object, where: str) -> Volume:
    known = {field.name for field in dataclasses.fields(Volume)} - {"name"}
    given = dict(_mapping(value, where, known))
    if "path" not in given:
        raise InvalidArgument(f"{where} has no path: say where the application finds it")
    size = given.pop("size", 0)
    read_only = given.pop("read_only", False)
    if not isinstance(read_only, bool):
        raise InvalidArgument(f"{where}.read_only is {shown(read_only)}: give true or false")
    options = _mapping(given.pop("options", {}), f"{where}.options", None)
    texts = {key: _text(item, f"{where}.{key}") for key, item in given.items()}
    return Volume(
        name,
        size=size if type(size) is int else _text(size, f"{where}.size"),
        options={
            str(key): _text(item, f"{where}.options.{key!s:.60}") for key, item in options.items()
        },
        read_only=read_only,
        **texts,
    )


def _name(key: object, of: str) -> str:
    return checked_name(str(key), of)


def _mapping(value: object, where: str, known: set[str] | None) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{where} is {shown(value)}: 'key: value' pairs belong there")
    for key in value:
        if known is not None and key not in known:
            raise InvalidArgument(
                f"{where} does not know {shown(key)}: it knows {', '.join(sorted(known))}"
            )
    return value


def _text(value: object, where: str) -> str:
    # YAML reads yes and no as booleans: which text was meant, nobody knows.
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InvalidArgument(f"{where} is {shown(value)}: a text belongs there, in quotes")
    return str(value)


def _number(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{where} is {shown(value)}: a number belongs there")
    return value


def _command(value: object, where: str) -> Sequence[str] | str:
    if isinstance(value, list):
        return [_text(item, where) for item in value]
    return _text(value, where)
