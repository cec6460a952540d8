"""What the README says is proven: the tests are there, and what is enumerated is as many.

Figures of chance are not compared: they depend on the machine, and each run tells its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nbdstore.store.host import Failpoint
from tests.conformance.case import RULES
from tests.conformance.cases import all_cases
from tests.control.test_backup_power_loss import RULES as BACKUP_RULES
from tests.fuzz.test_corpus import BROKEN as BROKEN_PARSERS
from tests.load.scene import HOSTILE_SHARE, SLOWEST_S
from tests.peers.sabotage import SABOTAGES
from tests.peers.test_nbdstore import SKIPPED as CONFIGURATIONS
from tests.simulation import test_worlds
from tests.simulation.mutations import MUTATIONS
from tests.soak import PARTS
from tests.store.short_plays import OPERATIONS
from tests.store.short_sequences import BASES, RESTRICTED, sequences
from tests.store.subjects import subjects
from tests.store.test_exhaustive import SHARES
from tests.store.test_exhaustive_oracle import FOUND_BY
from tests.store.test_oracle import BROKEN as BROKEN_RULES
from tests.store.test_snapshot_oracle import RULES as SNAPSHOT_RULES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROVEN = README.partition("## What is proven\n")[2].partition("\n## ")[0]

LONGEST = max(SHARES)
IN_CI = sum(len(sequences(length, (0, share))) for length, share in SHARES.items())
EVERYTHING = [s for length in range(1, LONGEST + 1) for _, s in sequences(length)]
N_MORE = sum(not RESTRICTED.isdisjoint(sequence) for sequence in EVERYTHING)
N_ALL = len(EVERYTHING) - N_MORE
N_BROKEN = len(BROKEN_RULES) + len(SNAPSHOT_RULES) + len(MUTATIONS)
N_BROKEN_IN_SEQUENCES = len(FOUND_BY.keys() - BACKUP_RULES.values())
N_BROKEN += N_BROKEN_IN_SEQUENCES + len(BACKUP_RULES) + len(BROKEN_PARSERS) + len(SABOTAGES)
N_WORLDS = sum(n for name, n in vars(test_worlds).items() if name.endswith("_WORLDS"))
WORDS = {3: "three"}


@pytest.mark.parametrize(
    "said",
    [
        f"every sequence of up to {LONGEST} of {len(OPERATIONS)} operations on {len(BASES)} pools",
        f"| {IN_CI:,} sequences",
        f"and {N_MORE:,} with {len(RESTRICTED)} others",
        f"all {N_ALL:,} sequences of the {len(OPERATIONS)}",
        f"the {N_MORE:,} others on",
        f"{len(Failpoint)} of them",
        f"| {N_WORLDS} worlds",
        f"in {WORDS[len(subjects())]} pools each byte",
        f"{len(all_cases())} cases on {len(RULES)} rules",
        f"each in one of {len(CONFIGURATIONS)} configurations at least",
        f"one in {1 / HOSTILE_SHARE:.0f}".replace("10", "ten"),
        f"no request may take {SLOWEST_S:.0f} s",
        f"{N_BROKEN} faults put into the store",
        f"[power_loss](tests/store/test_oracle.py) ({len(BROKEN_RULES)})",
        f"[with snapshots](tests/store/test_snapshot_oracle.py) ({len(SNAPSHOT_RULES)})",
        f"[in sequences](tests/store/test_exhaustive_oracle.py) ({N_BROKEN_IN_SEQUENCES})",
        f"[of backups](tests/control/test_backup_power_loss.py) ({len(BACKUP_RULES)})",
        f"[simulation](tests/simulation/mutations.py) ({len(MUTATIONS)})",
        f"[fuzz](tests/fuzz/test_corpus.py) ({len(BROKEN_PARSERS)})",
        f"[conformance](tests/peers/sabotage.py) ({len(SABOTAGES)})",
    ],
)
def test_the_readme_counts_right(said: str) -> None:
    assert said in PROVEN


def test_every_file_that_is_named_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PROVEN)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_every_long_test_is_named(part: object) -> None:
    module = getattr(part, "module", "").replace(".", "/")
    assert re.search(rf"\]\({module}(/\w+)?\.py\)", PROVEN)


def test_the_place_in_the_conformance_clients_readme_is_there() -> None:
    (anchor,) = re.findall(r"conformance/README\.md#([\w-]+)", PROVEN)
    titles = re.findall(r"^## (.*)$", (ROOT / "tests/conformance/README.md").read_text(), re.M)
    assert anchor in [title.lower().replace(" ", "-") for title in titles]
