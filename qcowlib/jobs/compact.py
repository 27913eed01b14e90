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

from qcowlib.driver import DATA, SPARSE
from qcowlib.errors import UnsupportedFeature, UsageError
from qcowlib.gate import deny_all
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.pipeline import Control
from qcowlib.native import RunList, zero_runs
from qcowlib.ondisk import CRYPT_LUKS
from qcowlib.qcow2.check import check
from qcowlib.qcow2.compact import Compaction
from qcowlib.qcow2.directories import read_header
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.qcow2.repair import repair
from qcowlib.storage.file import FileStorage
from qcowlib.storage.shadow import ShadowStorage
from qcowlib.units import MiB, round_down, round_up

if TYPE_CHECKING:
    from qcowlib.image import CacheMode
    from qcowlib.ondisk import Header
    from qcowlib.opening import Secrets
    from qcowlib.storage.base import Storage

__all__ = ["CompactPlan", "compact", "plan_compact"]

_PIECE = 2 * MiB
#: A cluster that is a hole of the file takes a place in it all the same.
_STORED = (DATA, SPARSE)


class CompactPlan(NamedTuple):
    """What :func:`compact` does, in bytes.

    *file_size* is the length of the file, or what a device holds that is in
    use, before and after (*new_size*); *leaks* is what is counted and not
    used; *zeros* what is found to be zero; *moved* is split in guest data,
    L2 tables, refcount blocks and the rest (L1 tables, refcount table,
    snapshot table, bitmaps, LUKS header); *free* remains as holes below the
    new end; *fixed_end* is where the last cluster lies that cannot move;
    *zeros_kept* is what is zero and stays, as version 2 has no zero clusters
    above a backing file; *left* says in a line what was not looked at or
    moved, and why.
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
    moved_other: int = 0
    zeros_kept: int = 0
    left: str = ""

    @property
    def moved(self) -> int:
        """All bytes that are moved."""
        return self.moved_data + self.moved_tables + self.moved_blocks + self.moved_other


def compact(
    path: str | bytes | os.PathLike[str] | Storage,
    *,
    zeros: bool = False,
    secret: Secrets | None = None,
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

    *secret* is the passphrase of an encrypted image: guest data in LUKS is
    encrypted for its place in the file and moves only with it, zeros are
    found only with it.  An external data file is not touched.

    Raises: UsageError for an image with errors (repair it first); FormatError
    for anything but qcow2; SecretError; Busy; Cancelled; StorageError.
    """
    from qcowlib.storage.imagelock import lock_image

    control = Control(progress=progress, cancel=cancel, rate=rate, workers=1)
    if not isinstance(path, str | bytes | os.PathLike):
        done = _compact(_Device(path), zeros, secret, control, trial=False)  # type: ignore[arg-type]
        control.end()
        return done
    storage = FileStorage.open(path, writable=True, cache=cache)
    try:
        lock_image(storage.fileno(), storage.name, "write")
        done = _compact(storage, zeros, secret, control, trial=False)
    finally:
        storage.close()
    control.end()
    return done


def plan_compact(
    path: str | bytes | os.PathLike[str] | Storage, *, zeros: bool = False, secret: Secrets | None = None
) -> CompactPlan:
    """Tell what :func:`compact` would do; nothing is changed or locked.  Raises: as :func:`compact`."""
    if not isinstance(path, str | bytes | os.PathLike):
        trial = _Device(ShadowStorage(path, name=path.name))
        return _compact(trial, zeros, secret, Control(workers=1), trial=True)  # type: ignore[arg-type]
    storage = FileStorage.open(path)
    try:
        shadow = ShadowStorage(storage, name=storage.name)
        return _compact(shadow, zeros, secret, Control(workers=1), trial=True)
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


def _compact(storage: Storage, zeros: bool, secret: Secrets | None, control: Control, *, trial: bool) -> CompactPlan:
    header = _settled(storage)
    is_block = getattr(storage, "is_block", False)
    report = check(storage)
    if report.corruptions or report.check_errors:
        raise UsageError("the image has errors; repair it first", path=storage.name)
    before = report.image_end_offset if is_block else storage.size
    found, kept, cipher = 0, 0, None
    readable = not header.has_data_file and (secret is not None or not header.crypt_method)
    if readable and (zeros or header.crypt_method):
        with _opened(storage, secret) as image:
            top = image.layers[0]
            if not isinstance(top, Qcow2Image):
                raise UnsupportedFeature("only qcow2 images can be compacted", path=storage.name)
            cipher = top.reader.cipher
            # What becomes a zero cluster was zero before: no bitmap is to record it.
            top.tracker = _NoTracker()
            keeps = header.version == 2 and header.backing_file is not None
            for start, length in _zero_clusters(image, control) if zeros else ():
                if keeps:
                    kept += length
                else:
                    image.zero(length, start)
                    found += length
        header, report = read_header(storage), check(storage)
    leaks = report.leaks << header.cluster_bits
    if report.leaks:
        repair(storage, "leaks")
    work = Compaction(storage, header, cipher)
    plan = work.plan()
    size = header.cluster_size
    done = CompactPlan(
        file_size=before,
        new_size=plan.end if is_block else min(plan.end, before),
        leaks=leaks,
        zeros=found,
        moved_data=plan.data * size,
        moved_tables=plan.tables * size,
        moved_blocks=plan.blocks * size,
        moved_other=plan.other * size,
        free=plan.free,
        fixed_end=plan.fixed_end,
        zeros_kept=kept,
        left=_left(header, zeros, readable, kept),
    )
    control.begin(done.moved)
    if not trial:
        work.run(lambda count: _moved(control, count))
    return done


def _settled(storage: Storage) -> Header:
    """Return the header, after repairing what a writer left under the dirty bit."""
    header = read_header(storage, writable=True)
    if header.is_dirty:
        # Source: qemu repairs such an image inside a writable open.
        repair(storage, "all")
        header = read_header(storage, writable=True)
    return header


def _left(header: Header, zeros: bool, readable: bool, kept: int) -> str:
    """Say what stays as it is."""
    parts = []
    if header.has_data_file:
        parts.append("guest data in the external data file stays as it is")
    elif header.crypt_method == CRYPT_LUKS and not readable:
        parts.append("guest data stays where it is, as LUKS data cannot move without the passphrase")
    elif zeros and not readable:
        parts.append("zeros in encrypted data are not found without the passphrase")
    if kept:
        parts.append(f"{kept} bytes of zeros stay, as version 2 cannot hide a backing file by zero clusters")
    return "; ".join(parts)


def _opened(storage: Storage, secret: Secrets | None) -> Image:
    kept: Storage = _Kept(storage)  # type: ignore[assignment]
    return open_image(kept, "r+", format="qcow2", references=deny_all, backing=False, lock=False, secret=secret)


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
        if not any(_stored(image, offset, length)):
            continue
        image.preadinto(buffer[:length], offset)
        for start, count, zero in zero_runs(buffer[:length], cluster):
            for low, high in _stored(image, offset + start, count) if zero else ():
                low, high = round_up(low, cluster), high if high == image.size else round_down(high, cluster)
                if low < high:
                    yield low, high - low


def _stored(image: Image, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the parts ``(start, end)`` of a range that are stored as data, holes of the file among them or not."""
    end = offset + length
    start = offset
    while offset < end:
        found: RunList = image.map(offset, end - offset)
        for kind, at, count, _, _ in found:
            if kind not in _STORED:
                if start < at:
                    yield start, at
                start = at + count
        offset = found.end
    if start < end:
        yield start, end
