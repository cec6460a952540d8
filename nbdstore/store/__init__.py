"""The store: pools of thin volumes on a local filesystem.

Layers within: layout, errors <- host, lazyarray <- superblock, records, journal, slots, blockmap,
catalogue <- core <- durability, mapmemory, reading, extents, writing, ranges, checkpoint <- image
<- volume <- registry <- recovery <- pool, check, salvage.  host is the contract of the I/O layer,
local_host its real implementation, which only those three know, as what is used by default.
"""

from nbdstore.store.core import PoolOptions
from nbdstore.store.extents import Extent, ExtentKind
from nbdstore.store.pool import Pool
from nbdstore.store.reading import Segment
from nbdstore.store.volume import Volume

__all__ = ["Extent", "ExtentKind", "Pool", "PoolOptions", "Segment", "Volume"]
