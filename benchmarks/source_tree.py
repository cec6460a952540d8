"""Measure a filesystem at work: mkfs.ext4, a source tree unpacked, and removed again.

The tree is made up, the same on every machine: C-like text, file sizes as in a kernel's sources
(median 4 KiB, a few of 100 KiB and more).
"""

from __future__ import annotations

import io
import itertools
import random
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.devices import Attach
from benchmarks.model import Sample, Stage
from benchmarks.server import Server
from benchmarks.tools import Tools

_SEED: Final = 1
_MEDIAN_BYTES: Final = 4096
_SPREAD: Final = 1.3  # of the logarithm of file sizes
_MAX_BYTES: Final = 1 << 20
_FILES_PER_DIRECTORY: Final = 25
_LINE: Final = b"\tif (unlikely(request->offset + request->length > disk->size)) return -EINVAL;\n"


@dataclass(frozen=True)
class SourceTree:
    """Time mkfs, unpacking and removing, each until it is on disk.

    Attributes:
        attach: how the volume becomes a block device.
    """

    attach: Attach

    def __call__(self, server: Server, stage: Stage, tools: Tools) -> Sample:
        archive = _archive(tools)
        mountpoint = server.directory / "mnt"
        mountpoint.mkdir(exist_ok=True)
        run = tools.children.run
        with self.attach(server, tools) as device:
            before_s = server.cpu_s()
            times = [time.monotonic()]
            # What ext4 puts off is done at once, so that no thread of the kernel works on beside
            # what is measured.
            lazy = "lazy_itable_init=0,lazy_journal_init=0"
            run("mkfs.ext4", "-q", "-F", "-E", lazy, device, timeout_s=300)
            times.append(time.monotonic())
            run("mount", device, mountpoint)
            try:
                run("tar", "-xf", archive, "-C", mountpoint, timeout_s=600)
                run("sync", "-f", mountpoint, timeout_s=300)
                times.append(time.monotonic())
                run("rm", "-r", mountpoint / "tree", timeout_s=300)
                run("sync", "-f", mountpoint, timeout_s=300)
                times.append(time.monotonic())
            finally:
                run("umount", mountpoint, timeout_s=300)
            used_s = server.cpu_s() - before_s
        mkfs_s, untar_s, rm_s = (late - early for early, late in itertools.pairwise(times))
        return Sample(
            times[-1] - times[0],
            operations=tools.scale.tree_files,
            server_cpu_s=used_s,
            details={"mkfs s": mkfs_s, "untar s": untar_s, "rm s": rm_s},
        )


def _archive(tools: Tools) -> Path:
    """The tree as a tar file, made once for all peers."""
    path = tools.directory / "tree.tar"
    if not path.exists():
        partial = path.with_suffix(".partial")
        write_tree(partial, tools.scale.tree_files)
        partial.rename(path)
    return path


def write_tree(path: Path, n_files: int) -> None:
    """Write a tar file of `n_files` files, always the same ones."""
    source = random.Random(_SEED)
    with tarfile.open(path, "w") as archive:
        for number in range(n_files):
            size = min(_MAX_BYTES, int(_MEDIAN_BYTES * source.lognormvariate(0, _SPREAD)))
            directory = f"tree/part-{number // _FILES_PER_DIRECTORY}"
            entry = tarfile.TarInfo(f"{directory}/file-{number}.c")
            entry.size = size
            text = b"/* %016x */\n" % source.getrandbits(64) + _LINE * (size // len(_LINE) + 1)
            archive.addfile(entry, io.BytesIO(text[:size]))
