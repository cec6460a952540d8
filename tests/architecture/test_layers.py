"""Who may import whom. A layer knows the layers that it lists, and nothing above or beside it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdstore

PACKAGE = Path(nbdstore.__file__).parent

# Layer: what it may import. A layer is a module or a package, and may always import itself; the
# longest name that fits decides. ``errors`` and the package's own version are for all.
LAYERS: dict[str, set[str]] = {
    "nbdstore": set(),
    "nbdstore.errors": set(),
    "nbdstore.file_signature": set(),
    "nbdstore.lease": set(),
    "nbdstore.qos": {"sizes"},
    "nbdstore.sizes": set(),
    "nbdstore.systemd": set(),
    "nbdstore.unix_socket": set(),
    "nbdstore.protocol": set(),
    "nbdstore.store": {"sizes"},
    "nbdstore.server": {"protocol", "store", "file_signature", "lease", "qos", "unix_socket"},
    "nbdstore.control": {
        *("store", "server", "file_signature", "lease", "qos", "sizes", "unix_socket"),
    },
    "nbdstore.agent": {"protocol", "control", "sizes", "systemd", "unix_socket"},
    "nbdstore.docker_plugin": {"agent", "control", "sizes", "unix_socket"},
    "nbdstore.orchestration": {"sizes"},
    "nbdstore.daemon": {"protocol", "store", "server", "control", "systemd", "sizes"},
    "nbdstore.commands": {
        *("protocol", "store", "server", "control", "agent", "daemon", "systemd", "sizes"),
        *("docker_plugin", "orchestration"),
    },
    "nbdstore.cli": {"commands", "sizes"},
    "nbdstore.__main__": {"cli"},
}
FOR_ALL = {"nbdstore", "nbdstore.errors"}

# Layer: what of the world outside it must not know.
FORBIDDEN = {
    "nbdstore.protocol": {"asyncio", "uvloop", "numpy", "socket", "ssl", "os", "pathlib"},
    "nbdstore.store": {"socket", "ssl", "aiohttp", "click", "uvloop"},
    "nbdstore.server": {"aiohttp", "click"},
    "nbdstore.control": {"click"},
    # It runs on other hosts, beside what they are for: small, and quick to start.
    "nbdstore.agent": {"click", "asyncio", "aiohttp", "uvloop", "numpy"},
    "nbdstore.docker_plugin": {"click", "asyncio", "aiohttp", "uvloop", "numpy", "docker"},
    "nbdstore.orchestration": {"asyncio", "click", "numpy", "os"},
}
# What a pool gets from outside comes through its host, which tests replace by a simulated one.
FORBIDDEN |= {
    f"nbdstore.store.{path.stem}": FORBIDDEN["nbdstore.store"]
    | {"os", "time", "random", "secrets", "fcntl", "mmap", "ctypes", "threading", "concurrent"}
    for path in (PACKAGE / "store").glob("*.py")
    if path.stem not in ("local_host", "lazyarray")  # of lazyarray: memory, no I/O
}


MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """Return the layer that a module of nbdstore belongs to."""
    fitting = [layer for layer in LAYERS if module == layer or module.startswith(f"{layer}.")]
    return max(fitting, key=len)


def imports_of(path: Path) -> Iterator[str]:
    """Yield the full names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module
            yield from imported_names(node.module, node.names)


def imported_names(module: str, aliases: list[ast.alias]) -> Iterator[str]:
    """Tell ``from package import module`` from ``from module import name``."""
    for alias in aliases:
        path = PACKAGE.parent.joinpath(*module.split("."), alias.name)
        is_module = path.is_dir() or path.with_suffix(".py").is_file()
        yield f"{module}.{alias.name}" if is_module else module


def why_forbidden(importer: str, imported: str) -> str | None:
    """Say which rule an import breaks; None if it breaks none."""
    layer = layer_of(importer)
    root = imported.partition(".")[0]
    if root != "nbdstore":
        unknown = FORBIDDEN.get(importer, FORBIDDEN.get(layer, set()))
        return f"{layer} must not know {root}" if root in unknown else None
    target = layer_of(imported)
    allowed = FOR_ALL | {layer} | {f"nbdstore.{name}" for name in LAYERS[layer]}
    return None if target in allowed else f"{layer} must not import {target}"


def test_a_module_imports_only_what_its_layer_may() -> None:
    broken = {
        f"{module_name(path)}: {why}"
        for path in MODULES
        for imported in imports_of(path)
        if (why := why_forbidden(module_name(path), imported))
    }
    assert broken == set()


def test_every_module_belongs_to_a_layer() -> None:
    outside = [name for name in map(module_name, MODULES) if layer_of(name) == "nbdstore"]
    assert outside == ["nbdstore"]


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("nbdstore.protocol", {"asyncio", "numpy", "socket"}),
        # It runs on other hosts, and starts fast.
        ("nbdstore.orchestration", {"docker", "kubernetes", "yaml", "requests"}),
        # Every command starts with it, in scripts a hundred times.
        ("nbdstore.cli", {"nbdstore.control.client", "nbdstore.orchestration", "asyncio", "ssl"}),
        # The first client need not wait for the control API's HTTP.
        ("nbdstore.daemon", {"aiohttp", "http.client"}),
        ("nbdstore.control.client", {"nbdstore.store", "nbdstore.server", "numpy", "aiohttp"}),
    ],
)
def test_a_module_loads_without_what_it_does_not_need(module: str, unwanted: set[str]) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE)
    assert unwanted.isdisjoint(loaded.stdout.decode().split())


def test_the_rules_find_what_they_forbid() -> None:
    assert why_forbidden("nbdstore.protocol.replies", "nbdstore.store.pool")
    assert why_forbidden("nbdstore.store.pool", "nbdstore.server")
    assert why_forbidden("nbdstore.protocol.replies", "numpy.typing")
    assert why_forbidden("nbdstore.store.pool", "os")
    assert why_forbidden("nbdstore.store.pool", "aiohttp")
    assert not why_forbidden("nbdstore.store.local_host", "os")
    assert not why_forbidden("nbdstore.server.server", "nbdstore.store")
    assert not why_forbidden("nbdstore.store.pool", "nbdstore.errors")
