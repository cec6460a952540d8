"""Which crash proof covers which operation: the table, and why a cell is empty where one is.

Owns the table.  An operation is what somebody can ask for - over NBD, of the control API, of an
open pool - or what the pool does by itself.  A proof crashes what runs, and compares what is left
with what may be; each has a table of operations of its own, and a cell names entries of that:

===========  ===================================================================================
proof        does
===========  ===================================================================================
enumeration  short sequences, crashed at every moment with every loss: tests/store/exhaustive.py
histories    long ones of one pool, whose power fails again and again (tests/store/power_loss.py),
             and of two with backups between them (tests/control/backup_power_loss.py)
simulation   the whole server with its clients, on a simulated disk and network: tests/simulation
kills        the real server, killed: tests/kills
===========  ===================================================================================

test_proofs.py finds an operation that is not in the table, a cell that names what is in no proof,
an entry of a proof that stands in no cell, and a cell that is empty without a reason.  This shows
it all::

    python -m tests.proofs

What is kept of a lease, of limits and of how far a scrub is, is a property of its volume, so to the
store they are one change, which the histories make with properties of chance.  A lease ends when
somebody ends it or takes the next one, never by the clock, so there is no such end to be crashed.
Sending and telling differences keep nothing: what is proven of them is that they change nothing and
are of one moment, and that what comes of a sender that died can be gone on with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import click

PROOFS: Final = ("enumeration", "histories", "simulation", "kills")

Cell = tuple[str, ...] | str
"""Entries of a proof's table; or why there are none."""


@dataclass(frozen=True)
class Row:
    """One operation.

    Attributes:
        asked: how it is asked for: NBD commands, methods of `VolumeService`, `BackupService` and
            `Pool`.
    """

    asked: tuple[str, ...]
    enumeration: Cell
    histories: Cell
    simulation: Cell
    kills: Cell

    def cell(self, proof: str) -> Cell:
        """The cell of a proof, by its name."""
        found: Cell = getattr(self, proof)
        return found


_IMPORT: Final = "a property that bars the volume, writes, and the property gone: all are here"
_PROPERTY: Final = "Workload._properties"

TABLE: Final[dict[str, Row]] = {
    "write": Row(
        ("WRITE",),
        ("write", "part", "across", "large"),
        ("Client._batch", "Client._writes", "Client._race"),
        ("WRITE",),
        ("WRITE",),
    ),
    "flush, or write with FUA": Row(
        ("FLUSH",), ("fua", "flush"), ("Client._flush",), ("FLUSH",), ("FLUSH",)
    ),
    "trim": Row(("TRIM",), ("trim",), ("Client._zero",), ("TRIM",), ("TRIM",)),
    "write zeroes": Row(
        ("WRITE_ZEROES",),
        ("zero", "no-hole"),
        ("Client._zero",),
        ("WRITE_ZEROES",),
        ("WRITE_ZEROES",),
    ),
    "import": Row(("write_content",), _IMPORT, _IMPORT, _IMPORT, ("_import",)),
    "make a volume": Row(
        ("create_volume",), ("create",), ("Workload._create",), ("create",), ("_create",)
    ),
    "delete a volume for good": Row(
        ("delete_volume", "purge"),
        ("delete", "unclone"),
        ("Workload._delete",),
        ("delete", "empty"),
        ("_delete", "_purge"),
    ),
    "put into the trash": Row(
        ("delete_volume", "trash_volume"),
        ("trash",),
        ("SnapshotWork._trash",),
        ("trash",),
        ("_delete",),
    ),
    "take out of the trash": Row(
        ("restore", "restore_volume"),
        ("restore",),
        ("SnapshotWork._trash",),
        ("restore",),
        ("_restore",),
    ),
    "the time in the trash ends, or the pool needs the space": Row(
        (),
        ("expire",),
        ("SnapshotWork._watch_trash",),
        ("trash",),
        "when that is, is up to the pool: nobody has asked, so nobody could compare",
    ),
    "rename": Row(
        ("update_volume", "rename_volume"),
        ("rename",),
        ("Workload._rename",),
        ("rename",),
        ("_rename",),
    ),
    "grow": Row(
        ("update_volume", "resize_volume"),
        ("grow",),
        ("Workload._resize",),
        ("grow",),
        ("_resize",),
    ),
    "shrink, by force too": Row(
        ("update_volume", "resize_volume"),
        ("shrink",),
        ("Workload._resize",),
        ("shrink",),
        ("_shrink",),
    ),
    "grow or shrink beside the volume's own writes": Row(
        ("update_volume", "resize_volume"),
        ("shrink-beside", "grow-beside"),
        "the model knows changes by the order of their acknowledgement: a resize is alone",
        ("grow", "shrink"),
        "the control API shrinks nothing that is attached; what is grown here, nobody writes",
    ),
    "set limits": Row(
        ("update_volume", "set_properties"),
        ("limit",),
        (_PROPERTY,),
        ("limit",),
        ("_limit",),
    ),
    "take and end leases": Row(
        ("acquire_lease", "break_lease", "release_lease"),
        ("lease", "break"),
        (_PROPERTY,),
        ("lease", "end_lease"),
        ("_lease", "_break_lease"),
    ),
    "make snapshots, of several volumes at once": Row(
        ("create_snapshots",),
        ("snapshot",),
        ("SnapshotWork._create",),
        ("snapshot",),
        ("_snapshot",),
    ),
    "delete a snapshot": Row(
        ("delete_snapshot",), ("drop",), ("SnapshotWork._delete",), ("drop",), ("_drop",)
    ),
    "roll back": Row(
        ("rollback",), ("rollback",), ("SnapshotWork._roll_back",), ("roll_back",), ("_roll_back",)
    ),
    "clone": Row(("clone",), ("clone",), ("SnapshotWork._clone",), ("clone",), ("_clone",)),
    "flatten": Row(
        ("start_flatten", "flatten"),
        ("flatten",),
        ("SnapshotWork._flatten",),
        ("flatten",),
        ("_flatten",),
    ),
    "send": Row(
        ("send", "resume"),
        ("send",),
        ("Sender.stream", "Sender.rest"),
        ("Carrier._store", "Carrier._restore"),
        ("BackupKills._transfer",),
    ),
    "receive: full, incremental, resumed, given up": Row(
        ("receive", "receiving", "abort_receive"),
        ("receive", "receive-part", "resume", "abort"),
        ("Receiver._receive", "Receiver._receive_wrong", "Receiver._give_up", "Receiver._stray"),
        ("Carrier._store", "Carrier._restore", "Carrier._go_on"),
        ("BackupKills._transfer",),
    ),
    "scrub, and go on with one": Row(
        ("start_scrub", "cancel_operation"),
        ("scrub", "scrub-part"),
        (_PROPERTY,),
        ("scrub",),
        ("_scrub",),
    ),
    "enlarge the pool": Row(
        ("grow_pool", "grow"),
        ("enlarge",),
        ("Workload._grow",),
        ("enlarge",),
        "a pool that is killed while it fills has to stay full: test_full_pool.py enlarges them",
    ),
    "checkpoint": Row(
        ("checkpoint",),
        ("checkpoint", "settle"),
        ("Workload._checkpoint", "Workload._settle"),
        ("checkpoint", "settle"),
        "the server writes them by itself, more often than anybody asks",
    ),
    "read, tell differences, list": Row(
        ("READ", "CACHE", "BLOCK_STATUS", "read_content", "diff", "changes", "bytes_alone"),
        "nothing of it is kept, so a crash leaves nothing of it; all is read after each crash",
        ("Client._read", "SnapshotWork._read"),
        ("READ", "CACHE", "BLOCK_STATUS", "look"),
        ("READ", "CACHE", "BLOCK_STATUS"),
    ),
}

NOTHING_KEPT: Final = {
    *("pool", "capacity", "space", "attachments", "disconnect", "leases", "volumes", "volume"),
    *("snapshots", "trash", "operations", "operation"),
}
"""Methods of `VolumeService` that tell, or end what a restart ends, too."""

COURSE: Final[dict[str, set[str]]] = {
    "enumeration": {"kill"},
    "histories": {"Client.step", "Workload._administrate", "Workload._snapshot", "Workload.pause"}
    | {"SnapshotWork.run"},
    "simulation": {"crash", "restart", "evict", "relieve", "wait"},
    "kills": set(),
}
"""Entries of the proofs that are no operations: crashes, pauses, what makes room or chooses."""


@click.command()
def show() -> None:
    """Show which proof covers which operation."""
    for name, row in TABLE.items():
        click.echo(name)
        for proof in PROOFS:
            cell = row.cell(proof)
            told = f"({cell})" if isinstance(cell, str) else ", ".join(cell)
            click.echo(f"    {proof:<11}  {told}")


if __name__ == "__main__":
    show()
