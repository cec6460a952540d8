"""The route about where the space of a pool is."""

from __future__ import annotations

from nbdstore.control.operations import Operations
from nbdstore.control.routing import Call, route
from nbdstore.control.space import SpaceReport


class SpaceRoutes:
    """See the module."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @route("GET", "/v1/space", answer=SpaceReport)
    async def space(self, _call: Call) -> SpaceReport:
        """Tell where the space of the pool is, image by image.

        Capacity is used + reclaimable + free; used is data + maps; data is the sum of own, of all
        images and of what deleted volumes have left (emptying). What each snapshot holds alone is
        found out for this answer: that costs as much as has changed since.
        """
        return await self._operations.space()
