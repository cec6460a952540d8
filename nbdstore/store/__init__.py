"""The store: pools of thin volumes on a local filesystem.

Layers within: layout, errors <- disk, lazyarray <- superblock, records, journal, slots, blockmap,
catalogue <- core <- durability, mapmemory, reading, writing, ranges, checkpoint <- volume <-
registry <- recovery <- pool, check.
"""

from nbdstore.store.core import PoolOptions
from nbdstore.store.pool import Pool
from nbdstore.store.ranges import Extent, ExtentKind
from nbdstore.store.reading import Segment
from nbdstore.store.volume import Volume

__all__ = ["Extent", "ExtentKind", "Pool", "PoolOptions", "Segment", "Volume"]
