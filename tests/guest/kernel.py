"""The distribution's kernel for the guest: downloaded once, unpacked, never installed.

Owns the cache of kernels; knows nothing of booting one. A kernel in the cache is a directory::

    RELEASE.SELECTION/vmlinuz     the image that QEMU boots
    RELEASE.SELECTION/modules/    the modules of MODULES and what they depend on, not compressed
    RELEASE.SELECTION/load-order  their file names, one per line, in an order in which insmod works

SELECTION stands for MODULES: a kernel with another choice of modules is not taken. A kernel is
unpacked beside its final place and renamed into it, so what has a name is complete.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Packages that depend on the newest kernel of a distribution: Debian's, Ubuntu's.
KERNEL_PACKAGES = ("linux-image-amd64", "linux-image-generic")
MODULES = (
    "virtio_pci",
    "virtio_net",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "nbd",
    "crc32c_generic",
    "ext4",
    "xfs",
    # For a Docker engine in the guest.
    "bridge",
    "veth",
)
SELECTION = f"{zlib.crc32(' '.join(MODULES).encode()):08x}"
DOWNLOAD_TIMEOUT_S = 300


class KernelError(Exception):
    """There is no kernel for the guest, and none could be downloaded."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of the cache."""

    directory: Path

    @property
    def image(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def modules(self) -> list[Path]:
        """The modules' files, in the order in which they can be loaded."""
        names = (self.directory / "load-order").read_text().split()
        return [self.directory / "modules" / name for name in names]


def cache_directory() -> Path:
    """Name the directory that outlives a run of the tests; see the XDG base directory rules."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nbdstore-tests" / "kernels"


def fetch_kernel(cache: Path | None = None) -> Kernel:
    """Return the cached kernel; download it before, if there is none.

    Raises KernelError if it can neither be found nor downloaded.
    """
    cache = cache or cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        cached = sorted(cache.glob(f"*.{SELECTION}/load-order"))
        if cached:
            return Kernel(cached[-1].parent)
        for unfinished in cache.glob("new-*"):
            shutil.rmtree(unfinished)
        with tempfile.TemporaryDirectory(prefix="new-", dir=cache) as new:
            return unpack_kernel(download_packages(Path(new)), Path(new), cache)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes, for as long as the context lasts."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download_packages(directory: Path) -> list[Path]:
    """Download the packages that make up the distribution's newest kernel."""
    packages = find_packages()
    if not packages and os.geteuid() == 0:
        run("apt-get", "update", "--quiet=2")
        packages = find_packages()
    if not packages:
        raise KernelError(f"apt-cache knows none of {', '.join(KERNEL_PACKAGES)}")
    # As root apt-get would download as another user, who may not write here.
    run("apt-get", "--option=APT::Sandbox::User=root", "download", *packages, cwd=directory)
    return sorted(directory.glob("*.deb"))


def find_packages() -> list[str]:
    for package in KERNEL_PACKAGES:
        output = run("apt-cache", "depends", "--recurse", "--important", package, check=False)
        if found := re.findall(r"^linux-(?:image|modules|modules-extra)-\d\S+", output, re.M):
            return sorted(set(found))
    return []


def unpack_kernel(packages: list[Path], work: Path, cache: Path) -> Kernel:
    """Take from the packages what a guest needs, and put it into the cache."""
    for package in packages:
        run("dpkg-deb", "--extract", str(package), str(work / "root"))
    (image,) = work.glob("root/boot/vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    if not (work / "root/lib").exists():
        (work / "root/lib").symlink_to("usr/lib")
    run("depmod", "--basedir", str(work / "root"), release)

    kernel = work / release
    (kernel / "modules").mkdir(parents=True)
    shutil.copy(image, kernel / "vmlinuz")
    names = [unpack_module(path, kernel / "modules") for path in load_order(work / "root", release)]
    (kernel / "load-order").write_text("".join(f"{name}\n" for name in names))
    complete = cache / f"{release}.{SELECTION}"
    kernel.rename(complete)
    return Kernel(complete)


def load_order(root: Path, release: str) -> list[Path]:
    """List the files of MODULES and of all that they depend on, each after its dependencies."""
    options = ("--dirname", str(root), "--set-version", release, "--config", "/dev/null")
    output = run("modprobe", *options, "--show-depends", "--all", *MODULES)
    paths = re.findall(r"^insmod (\S+)", output, re.M)
    return [Path(path) for path in dict.fromkeys(paths)]


def unpack_module(path: Path, directory: Path) -> str:
    """Write a module to ``directory``, without its compression; return its name there."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        data = lzma.decompress(data)
    elif path.suffix == ".zst":
        done = subprocess.run(["zstd", "-dc", path], check=True, stdout=subprocess.PIPE)
        data = done.stdout
    name = path.name.partition(".ko")[0] + ".ko"
    (directory / name).write_bytes(data)
    return name


def run(*argv: str, cwd: Path | None = None, check: bool = True) -> str:
    """Run a program of the system; raise KernelError, with all it said, if it fails."""
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DOWNLOAD_TIMEOUT_S,
            text=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{argv[0]}: {error}") from error
    if check and done.returncode:
        raise KernelError(f"{' '.join(argv)} ended with {done.returncode}: {done.stdout.strip()}")
    return done.stdout
