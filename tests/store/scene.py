"""A pool on a simulated disk in virtual time, for tests that wait, fail, or crash at one moment."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

from nbdstore.store import Pool, PoolOptions
from tests.store import virtual_clock
from tests.store.crashes import LAZY, Crash, crash_images
from tests.store.power_loss import assert_clean, new_pool, recover
from tests.store.simulated_disk import PLACE, Fault, Images, SimulatedDisk, adversarial
from tests.store.workload import Spread

Act = Callable[[Pool], Awaitable[None]]


class Scene:
    """What happens to one pool, act by act.

    Attributes:
        disk: of the present act; its `fault` may be set at any time.
    """

    def __init__(
        self, capacity: int = 24 << 20, *, block_size: int = 4096, greedy: bool = True
    ) -> None:
        self.disk = SimulatedDisk(new_pool(block_size, capacity))
        self._greedy = greedy

    def play(self, act: Act, *, close: bool = False, **options: Any) -> None:
        """Open the pool and let `act` go on; then close it, or kill the process."""

        async def main() -> None:
            chosen = PoolOptions(**options)
            chosen = adversarial(chosen) if self._greedy else chosen
            pool = await Pool.open(PLACE, chosen, host=self.disk.host)
            await act(pool)
            if close:
                await pool.close()

        virtual_clock.run(main())

    def begin_again(self, images: Images | None = None, fault: Fault | None = None) -> None:
        """Go on with `images`, by default what the last act left, on a disk without a past."""
        self.disk = SimulatedDisk(images or self.disk.images, fault=fault)

    def crashed(self, crash: Crash = LAZY, *, at: int | None = None) -> Images:
        """What is left after a crash, after `at` events or now; a check finds nothing in it."""
        moment = len(self.disk.events) if at is None else at
        images = crash_images(self.disk, moment, crash, random.Random(1))
        assert_clean(images)
        return images

    def after(self, crash: Crash = LAZY, name: str = "v") -> bytes:
        """What a volume holds after `crash` and recovery."""
        return recover(SimulatedDisk(self.crashed(crash)), Spread())[name][2]

    def assert_clean(self) -> None:
        """Assert that a check of what the disk holds now finds nothing."""
        assert_clean(self.disk.images)
