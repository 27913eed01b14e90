# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a format answers: where guest bytes are, never the bytes themselves.

Invariant: everything above this layer (chain, jobs, api) works on the kinds
below and knows no L1, L2 or refcount.  A run list covers the asked range
exactly, in order, and neighbours that continue each other are one run.

Kinds of runs in a :class:`~qcowlib.native.RunList` (small integers, so that
compiled code and Python share them):

========== ==================================================================
HOLE       not allocated in this layer: the backing layer shows, or zeros
ZERO       reads as zeros whatever lies below; ``host`` is the reserved space or
           ``NO_OFFSET``
DATA       bytes at ``host`` of the layer's data storage
COMPRESSED one compressed cluster; ``host`` is the raw L2 entry
END        past the end of this layer: zeros, and the search stops
SPARSE     a data cluster whose bytes are a hole of the file: reads as zeros
========== ==================================================================
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Literal, NamedTuple

    from qcowlib.ondisk.bitmaps import BitmapEntry
    from qcowlib.ondisk.snapshots import SnapshotEntry

    ExtentKind = Literal["data", "zero", "hole", "compressed", "sparse"]
else:
    from qcowlib.records import NamedTuple


__all__ = [
    "COMPRESSED",
    "DATA",
    "END",
    "HOLE",
    "NO_OFFSET",
    "SPARSE",
    "ZERO",
    "Bitmap",
    "Extent",
    "ExtentKind",
    "Snapshot",
]

HOLE: Final = 0
ZERO: Final = 1
DATA: Final = 2
COMPRESSED: Final = 3
END: Final = 4
SPARSE: Final = 5

NO_OFFSET: Final = (1 << 64) - 1


class Extent(NamedTuple):
    """A run of guest bytes of one kind, as ``Image.extents`` yields it.

    ``start`` and ``length`` are guest bytes.  ``offset`` is the place in the
    file of layer ``depth`` (0 = the opened image) or ``None`` where there is
    none (holes, compressed data, zero clusters without reserved space).
    ``present`` is false where no layer has anything allocated.
    """

    kind: ExtentKind
    start: int
    length: int
    offset: int | None
    depth: int
    present: bool


class Snapshot(NamedTuple):
    """What callers see of an internal snapshot; sizes in bytes.

    ``date`` is when it was taken, nanoseconds since 1970; ``vm_clock_nsec`` how
    long the guest had run.  ``disk_size`` and ``icount`` are ``None`` where the
    image does not tell.
    """

    id: str
    name: str
    date: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int | None
    icount: int | None

    @classmethod
    def of(cls, entry: SnapshotEntry) -> Snapshot:
        """Return what the table entry says."""
        return cls(
            entry.id.decode("utf-8", "surrogateescape"),
            entry.name.decode("utf-8", "surrogateescape"),
            entry.date_sec * 1_000_000_000 + entry.date_nsec,
            entry.vm_clock_nsec,
            entry.vm_state_size,
            entry.disk_size,
            entry.icount,
        )


class Bitmap(NamedTuple):
    """What callers see of a persistent bitmap; *granularity* is guest bytes a bit.

    An *enabled* one records what changes from now on.  An *inconsistent* one
    was not saved by its last writer: it can only be removed.
    """

    name: str
    granularity: int
    enabled: bool
    inconsistent: bool

    @classmethod
    def of(cls, entry: BitmapEntry) -> Bitmap:
        """Return what the directory entry says."""
        return cls(entry.name.decode("utf-8", "surrogateescape"), entry.granularity, entry.auto, entry.in_use)
