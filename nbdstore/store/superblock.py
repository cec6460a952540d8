"""The superblock: where the last checkpoint's trees start, and from where to replay the journal.

Owns the format of the file ``super`` and the choice between its two copies.

Format: two copies of 4096 bytes, at bytes 0 and 4096.  Each is the struct below, little-endian,
zeros, and at byte 4088 the xxh3_64 of the 4088 bytes before it.  The valid copy with the highest
generation wins.

Each generation is written to one copy, synced, then to the other, and synced again; only then may
what the generation before needs be overwritten.  The first to be written is never the copy that
the pool was opened by, which may be the only one: a crash at any moment leaves one that is whole,
whose checkpoint is whole.  And since both are the same afterwards, whatever happens to one of them
costs nothing; were they written alternately, damage to the newer one would bring the generation
before back to life, when others have its slots already.

=====  ====================  =======================================================
bytes  field                 meaning
=====  ====================  =======================================================
8      magic                 ``NBDSTORE``
4      format_version        1
4 x 3  features              compatible, readonly_compatible, incompatible
16     uuid                  of the pool
8      generation            counts superblocks written, from 1
4      block_size            bytes, a power of two
8      n_slots               capacity in slots
8      journal_size          bytes
8      journal_offset        where replay starts; counts on over laps of the ring
8      journal_seq           the first record to replay; all before are in the trees
8+8    catalogue             entry (location, checksum) of its root
8      catalogue_bytes       its length in bytes
8+8    free_map              entry of its root; it has ``ceil(n_slots / 8 / block_size)`` blocks
8      created               seconds since 1970
8      journal_mark          0, or the seq of an empty record that ends at journal_offset: as long
                             as nothing came after it, it tells this journal from another one
8+8    catalogue_copy        entry of the root of a second copy of the catalogue; 0 = there is none
=====  ====================  =======================================================
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass, replace
from typing import Final

import xxhash

from nbdstore.errors import Corruption, PoolFormatError, ReadFailed
from nbdstore.store import layout
from nbdstore.store.host import File

COPY_SIZE: Final = 4096
MAGIC: Final = b"NBDSTORE"
_STRUCT: Final = struct.Struct("<8s4I16sQIQQQQQQQQQQQQQ")
_CHECKSUM: Final = struct.Struct("<Q")
_ADVICE: Final = (
    "the other copy is no better, and nothing else says which blocks are whose: put back a copy "
    "of 'super' of this pool, or restore its volumes from a backup"
)
_CHECKSUM_AT: Final = COPY_SIZE - _CHECKSUM.size

Pointer = tuple[int, int]
"""An entry: (location, checksum)."""

NULL: Final[Pointer] = (0, 0)


@dataclass(frozen=True)
class Superblock:
    """One generation of the superblock; the fields are those of the module's table."""

    uuid: uuid.UUID
    generation: int
    block_size: int
    n_slots: int
    journal_size: int
    journal_offset: int
    journal_seq: int
    catalogue: Pointer
    catalogue_bytes: int
    free_map: Pointer
    created: int
    journal_mark: int = 0
    catalogue_copy: Pointer = NULL
    compatible: int = layout.FEATURES_COMPATIBLE
    readonly_compatible: int = layout.FEATURES_READONLY_COMPATIBLE
    incompatible: int = layout.FEATURES_INCOMPATIBLE
    format_version: int = layout.FORMAT_VERSION

    def next(self, **changes: object) -> Superblock:
        """Return the next generation, with `changes`."""
        return replace(self, generation=self.generation + 1, **changes)  # type: ignore[arg-type]

    def encode(self) -> bytes:
        """Return the 4096 bytes of this superblock."""
        body = _STRUCT.pack(
            MAGIC,
            self.format_version,
            self.compatible,
            self.readonly_compatible,
            self.incompatible,
            self.uuid.bytes,
            self.generation,
            self.block_size,
            self.n_slots,
            self.journal_size,
            self.journal_offset,
            self.journal_seq,
            *self.catalogue,
            self.catalogue_bytes,
            *self.free_map,
            self.created,
            self.journal_mark,
            *self.catalogue_copy,
        ).ljust(_CHECKSUM_AT, b"\0")
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def decode(raw: bytes, where: str) -> Superblock:
    """Parse one copy.

    Raises:
        PoolFormatError: it is whole, but of a version or with features unknown here.
        Corruption: it is no superblock, or its checksum does not fit.
    """
    if len(raw) < COPY_SIZE:
        raise Corruption(where, f"{COPY_SIZE} bytes", f"{len(raw)} bytes")
    if not raw.startswith(MAGIC):
        raise Corruption(where, f"magic {MAGIC.decode()}", repr(raw[: len(MAGIC)]))
    (expected,) = _CHECKSUM.unpack_from(raw, _CHECKSUM_AT)
    found = xxhash.xxh3_64_intdigest(raw[:_CHECKSUM_AT])
    if found != expected:
        raise Corruption(where, f"checksum {expected:016x}", f"{found:016x}")
    (_, version, compatible, readonly, incompatible, pool, generation, *rest) = _STRUCT.unpack_from(
        raw
    )
    if version != layout.FORMAT_VERSION:
        raise PoolFormatError(
            f"{where}: format version {version}; this nbdstore knows version "
            f"{layout.FORMAT_VERSION}: install the version that made the pool, or a newer one"
        )
    unknown = incompatible & ~layout.FEATURES_INCOMPATIBLE
    if unknown:
        raise PoolFormatError(
            f"{where}: the pool uses features this nbdstore does not know "
            f"(incompatible bits {unknown:#x}): install a newer version"
        )
    (block_size, n_slots, journal_size, offset, seq, cat0, cat1, cat_bytes, map0, map1, *rest) = (
        rest
    )
    created, mark, copy0, copy1 = rest
    return Superblock(
        uuid=uuid.UUID(bytes=pool),
        generation=generation,
        block_size=block_size,
        n_slots=n_slots,
        journal_size=journal_size,
        journal_offset=offset,
        journal_seq=seq,
        catalogue=(cat0, cat1),
        catalogue_bytes=cat_bytes,
        free_map=(map0, map1),
        created=created,
        journal_mark=mark,
        catalogue_copy=(copy0, copy1),
        compatible=compatible,
        readonly_compatible=readonly,
        incompatible=incompatible,
    )


@dataclass(frozen=True)
class Found:
    """What the file ``super`` holds.

    Attributes:
        newest: the valid superblock with the highest generation.
        copy: 0 or 1, where it stands.
        faults: what is wrong with the other copy.
    """

    newest: Superblock
    copy: int
    faults: list[Corruption]


def read(file: File) -> Found:
    """Return the newest valid superblock of `file`.

    Raises:
        PoolFormatError: a copy is of a format this version does not know.
        Corruption: both copies are damaged.
    """
    valid: dict[int, Superblock] = {}
    faults: list[Corruption] = []
    for copy in (0, 1):
        try:
            # Past the page cache, where one may be whose sync failed.
            raw = file.pread_direct(COPY_SIZE, copy * COPY_SIZE)
            valid[copy] = decode(raw, f"{file.name}, copy {copy}")
        except Corruption as error:
            faults.append(error)
        except ReadFailed as error:
            faults.append(Corruption(str(error), "a readable block", "an error of the disk"))
    if not valid:
        first = faults[0]
        raise Corruption(first.where, first.expected, first.found, _ADVICE)
    copy = max(valid, key=lambda copy: valid[copy].generation)
    return Found(valid[copy], copy, faults)


def write(file: File, superblock: Superblock, copy: int) -> None:
    """Write `superblock` to `copy`, 0 or 1; the caller syncs `file`."""
    file.pwritev([superblock.encode()], copy * COPY_SIZE)
