"""`python -m tests.kills --seed N --minutes M`: kill served pools for as long as one likes.

Each seed is a pool of its own for some rounds. The pool of a seed that failed, and its server's
log, stay where the message says.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.children import Children
from tests.clients.served_pool import ServedPool
from tests.kills.loop import Geometry, KillLoop, Tally
from tests.seeds import main

ROUNDS = 15


def kill_again_and_again(seed: int) -> Mapping[str, int]:
    """Do the rounds of one seed; return what they came to."""
    source, tally = random.Random(seed), Tally()
    directory = Path(tempfile.mkdtemp(prefix=f"nbdstore-kills-{seed}-"))
    try:
        with Children(directory) as children:
            pool = ServedPool(children, directory)
            loop = KillLoop(pool, Geometry.chosen(source), source, tally)
            for _ in range(ROUNDS):
                loop.round()
            pool.close()
    except BaseException as error:
        error.add_note(f"the pool and the server's log are in {directory}")
        raise
    shutil.rmtree(directory)
    return tally.figures_by_name()


if __name__ == "__main__":
    main("tests.kills", kill_again_and_again)
