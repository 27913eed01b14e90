# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Giving space back in place: leaks, zeros if wanted, then the tail moves down and the file is cut.

Invariants: the guest's bytes, snapshots and bitmaps are the same at every cut;
the image is locked as for writing, so nobody else sees it change; a job that
was cut is done by calling it again, and what it left over are leaks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from qcowlib.driver import DATA
from qcowlib.errors import UnsupportedFeature, UsageError
from qcowlib.gate import deny_all
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.pipeline import Control
from qcowlib.native import RunList, zero_runs
from qcowlib.qcow2.check import check
from qcowlib.qcow2.compact import Compaction
from qcowlib.qcow2.directories import read_header
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.qcow2.repair import repair
from qcowlib.storage.file import FileStorage
from qcowlib.storage.shadow import ShadowStorage
from qcowlib.units import MiB

if TYPE_CHECKING:
    from qcowlib.image import CacheMode
    from qcowlib.storage.base import Storage

__all__ = ["CompactPlan", "compact", "plan_compact"]

_PIECE = 2 * MiB


class CompactPlan(NamedTuple):
    """What :func:`compact` does, in bytes.

    *file_size* is the length of the file, or what a device holds that is in
    use, before and after (*new_size*); *leaks* is what is counted and not
    used; *zeros* what is found to be zero; *moved* is split in guest data,
    L2 tables and refcount blocks; *free* remains as holes below the new end;
    *fixed_end* is where the last cluster lies that cannot move.
    """

    file_size: int
    new_size: int
    leaks: int
    zeros: int
    moved_data: int
    moved_tables: int
    moved_blocks: int
    free: int
    fixed_end: int

    @property
    def moved(self) -> int:
        """All bytes that are moved."""
        return self.moved_data + self.moved_tables + self.moved_blocks


def compact(
    path: str | bytes | os.PathLike[str] | Storage,
    *,
    zeros: bool = False,
    cache: CacheMode = "writeback",
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
) -> CompactPlan:
    """Make the file of the QCOW2 image at *path* as short as its content allows, in place; returns what was done.

    Leaked clusters are freed, with *zeros* also those of the top layer that
    hold zeros only; then the clusters behind the new end move into free ones
    below, the file is cut (a device is not: *new_size* is what it must keep)
    and what is free below the end becomes holes.  A storage, such as the
    extents of a logical volume, is treated as a device; the caller keeps it,
    and keeps others away from it.

    Raises: UsageError for an image with errors (repair it first);
    UnsupportedFeature for raw, encrypted images and external data files; Busy;
    Cancelled; StorageError.
    """
    from qcowlib.storage.imagelock import lock_image

    control = Control(progress=progress, cancel=cancel, rate=rate, workers=1)
    if not isinstance(path, str | bytes | os.PathLike):
        done = _compact(_Device(path), zeros, control, trial=False)  # type: ignore[arg-type]
        control.end()
        return done
    storage = FileStorage.open(path, writable=True, cache=cache)
    try:
        lock_image(storage.fileno(), storage.name, "write")
        done = _compact(storage, zeros, control, trial=False)
    finally:
        storage.close()
    control.end()
    return done


def plan_compact(path: str | bytes | os.PathLike[str] | Storage, *, zeros: bool = False) -> CompactPlan:
    """Tell what :func:`compact` would do; nothing is changed or locked.  Raises: as :func:`compact`."""
    if not isinstance(path, str | bytes | os.PathLike):
        trial = _Device(ShadowStorage(path, name=path.name))
        return _compact(trial, zeros, Control(workers=1), trial=True)  # type: ignore[arg-type]
    storage = FileStorage.open(path)
    try:
        shadow = ShadowStorage(storage, name=storage.name)
        return _compact(shadow, zeros, Control(workers=1), trial=True)
    finally:
        storage.close()


class _NoTracker:
    """Keeps bitmaps as they are: see :class:`~qcowlib.qcow2.image.Tracker`."""

    async def load(self) -> None:
        pass

    async def begin(self, *, every: bool = False) -> None:
        pass

    async def begin_resize(self) -> None:
        pass

    async def save(self) -> None:
        pass


class _Kept:
    """Lends a storage to an image that closes what it was given."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> object:
        return getattr(self._storage, name)

    def close(self) -> None:
        """Leave it open."""


class _Device(_Kept):
    """A storage that is never cut, whatever it is made of."""

    is_block = True


def _compact(storage: Storage, zeros: bool, control: Control, *, trial: bool) -> CompactPlan:
    found = 0
    Compaction.require(read_header(storage), storage.name)
    with _opened(storage) as image:
        top = image.layers[0]
        if not isinstance(top, Qcow2Image):
            raise UnsupportedFeature("only qcow2 images can be compacted", path=storage.name)
        # What becomes a zero cluster was zero before: no bitmap is to record it.
        top.tracker = _NoTracker()
        report = image.check()
        if report.corruptions or report.check_errors:
            raise UsageError("the image has errors; repair it first", path=storage.name)
        before = report.image_end_offset if getattr(storage, "is_block", False) else storage.size
        if zeros and top.header.version > 2:
            for start, length in _zero_clusters(image, control):
                image.zero(length, start)
                found += length
        cluster, header = top.header.cluster_size, top.header
    report = check(storage)
    leaks = report.leaks * cluster
    if report.leaks:
        repair(storage, "leaks")
    work = Compaction(storage, header)
    plan = work.plan()
    moved = plan.data + plan.tables + plan.blocks
    control.begin(moved * cluster)
    if not trial:
        work.run(lambda count: _moved(control, count))
    return CompactPlan(
        before,
        plan.end if getattr(storage, "is_block", False) else min(plan.end, before),
        leaks,
        found,
        plan.data * cluster,
        plan.tables * cluster,
        plan.blocks * cluster,
        plan.free,
        plan.fixed_end,
    )


def _opened(storage: Storage) -> Image:
    kept: Storage = _Kept(storage)  # type: ignore[assignment]
    return open_image(kept, "r+", format="qcow2", references=deny_all, backing=False, lock=False)


def _moved(control: Control, count: int) -> None:
    control.check()
    control.add(count)
    control.throttle(count)
    control.report()


def _zero_clusters(image: Image, control: Control) -> Iterator[tuple[int, int]]:
    """Yield the runs ``(offset, length)`` of whole clusters that hold zeros as data, in order."""
    cluster = image.cluster_size or 1
    step = max(_PIECE, cluster)
    buffer = memoryview(bytearray(step))
    for offset in range(0, image.size, step):
        control.check()
        length = min(step, image.size - offset)
        if not any(run[0] == DATA for run in _runs(image, offset, length)):
            continue
        image.preadinto(buffer[:length], offset)
        for start, count, zero in zero_runs(buffer[:length], cluster):
            if zero:
                for run in _runs(image, offset + start, count):
                    low, high = max(run[1], offset + start), min(run[1] + run[2], offset + start + count)
                    if run[0] == DATA and low % cluster == 0 and (high % cluster == 0 or high == image.size):
                        yield low, high - low


def _runs(image: Image, offset: int, length: int) -> Iterator[tuple[int, int, int, int, int]]:
    end = offset + length
    while offset < end:
        found: RunList = image.map(offset, end - offset)
        yield from found
        offset = found.end
