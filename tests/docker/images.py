"""Images without a registry: a base image from the distribution's packages, and the project's own.

They are made once, and stay in the engine's cache (tests/docker/engine.py).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.docker.engine import Engine

ROOT = Path(__file__).parents[2]
MAKE_BASE = Path(__file__).with_name("make-base.sh")
BASE = "nbdstore-tests/base"
MAKE_TIMEOUT_S = 400.0
# What this machine trusts: where a proxy stands between it and the package registries, containers
# must trust that proxy, too.
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"


def base_image(engine: Engine) -> str:
    """Return the name of a minimal image of this machine's distribution."""
    if not engine.docker("images", "--quiet", BASE).strip():
        with tempfile.TemporaryDirectory(dir=engine.data.parent, prefix="base-") as directory:
            archive, work = Path(directory) / "base.tar", Path(directory) / "work"
            work.mkdir()
            engine.machine.run(
                *("unshare", "--mount", "sh", MAKE_BASE, archive, work, AUTHORITIES),
                timeout_s=MAKE_TIMEOUT_S,
            )
            trust = f"ENV PIP_CERT={AUTHORITIES}"
            engine.docker("import", "--change", trust, archive, BASE, timeout_s=MAKE_TIMEOUT_S)
    return BASE


def build(engine: Engine, target: str) -> str:
    """Build a target of the project's Dockerfile, and return the image's name."""
    name = f"nbdstore-tests/{target}"
    engine.docker(
        *("build", "--quiet", "--target", target, "--tag", name),
        *("--build-arg", f"BASE={base_image(engine)}", ROOT),
        timeout_s=MAKE_TIMEOUT_S,
    )
    return name
