"""The store: pools of thin volumes on a local filesystem.

Layers within: layout, errors <- host, lazyarray <- superblock, records, journal, slots, slotset,
blockmap, catalogue <- core <- durability, mapmemory, reading, extents, writing, ranges, checkpoint
<- image <- volume, snapshot <- registry, differences <- administration, flattening <- snapshots <-
recovery <- pool, salvage, treewalk <- check.  host is the contract of the I/O layer, local_host its
real implementation, which only pool, salvage and check know, as what is used by default.
"""

from nbdstore.store.core import PoolOptions
from nbdstore.store.differences import Change, changes
from nbdstore.store.extents import Extent, ExtentKind
from nbdstore.store.image import Image
from nbdstore.store.pool import Pool
from nbdstore.store.reading import Segment
from nbdstore.store.snapshot import Snapshot
from nbdstore.store.volume import Volume

__all__ = [
    "Change",
    "Extent",
    "ExtentKind",
    "Image",
    "Pool",
    "PoolOptions",
    "Segment",
    "Snapshot",
    "Volume",
    "changes",
]
