# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Incremental backup: what changed since a bitmap began, as an overlay over the backup before.

A round of backups of one disk::

    with qcowlib.open("disk.qcow2", "r+") as disk:      # with the full backup: begin to record
        disk.add_bitmap("monday")
    ...                                                  # writes
    with qcowlib.open("disk.qcow2", "r+") as disk:
        disk.add_bitmap("tuesday")                       # records for the next round
        disk.disable_bitmap("monday")
        qcowlib.backup(disk, "monday.qcow2", "monday", backing="full.qcow2", backing_format="qcow2")
        disk.remove_bitmap("monday")

or, with one bitmap for all rounds, ``backup(..., advance=True)``, which clears it
when the backup is durable.

Each overlay with its chain is the disk of its day, so ``convert`` of the newest
one restores everything; :func:`restore` applies one increment to an image that
holds the day before.

Invariants: the overlay holds every cluster that a bitmap touches, as the source
has it now, zeros as zeros, so that nothing older shows through; it has no magic
until all of it is durable (I11), and is removed if the job fails; bitmaps are advanced, all
by one switch, only after the overlay and its name are durable, so a cut at any point
leaves them with all that no backup holds.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from qcowlib.driver import COMPRESSED, DATA, HOLE
from qcowlib.errors import UsageError, printable
from qcowlib.gate import References, deny_all, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.copy import Copier
from qcowlib.jobs.creation import file_options
from qcowlib.jobs.measure import Measurement, measure
from qcowlib.jobs.overlay import joined, run_plan, write_overlay
from qcowlib.jobs.pipeline import DEFAULT_MEMORY, Control
from qcowlib.jobs.plan import BACKING, COPY, ZEROS, Plan, Run, Source
from qcowlib.jobs.targets import ImageTarget, RawTarget
from qcowlib.native import data_clusters
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.storage.file import sync_directory
from qcowlib.units import round_up

if TYPE_CHECKING:
    from typing import Never

    from qcowlib.image import CacheMode
    from qcowlib.opening import Secrets
    from qcowlib.opening import Source as OpenSource
    from qcowlib.storage.base import Storage

__all__ = ["RestorePlan", "backup", "changed_ranges", "measure_backup", "plan_restore", "restore"]

Bitmaps = str | Sequence[str]


class RestorePlan(NamedTuple):
    """What :func:`restore` does: guest bytes of *data* and of *zeros* that it writes, and the size before and after."""

    data: int
    zeros: int
    size_before: int
    size: int


def backup(
    source: OpenSource | Image,
    target: str | bytes | os.PathLike[str] | Storage,
    bitmap: Bitmaps,
    *,
    backing: str | os.PathLike[str],
    backing_format: str,
    source_format: str | None = None,
    advance: bool = False,
    compress: bool = False,
    check_backing: bool = True,
    references: References = qemu_like,
    source_cache: CacheMode = "writeback",
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: Secrets | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    **options: object,
) -> int:
    """Write what *bitmap* (or any of several) of *source* has recorded to a new overlay *target* over *backing*.

    *backing*, stored as given, is the backup that was complete when the bitmap
    began; with *check_backing* it must be there.  Whole clusters of the target
    are stored, read from the source; returns how many guest bytes these are.
    Nobody may write to the source meanwhile.

    With *advance* the bitmaps, which must be enabled, are cleared once the target
    is durable: they then record what changes after this backup.  A cut before
    that makes the next backup larger, never incomplete.
    *options* are :class:`~qcowlib.jobs.creation.NewOptions` of the target, the
    five before them those of :class:`~qcowlib.jobs.pipeline.Control`.

    Raises: UsageError for an unknown or inconsistent bitmap, or one that cannot
    be advanced, before anything is written; Cancelled; any error of opening;
    StorageError.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    name = os.fsdecode(target) if isinstance(target, str | bytes | os.PathLike) else target.name
    with ExitStack() as stack:
        image = _opened(
            stack, source, source_format, references, source_cache, force_share, secret, "r+" if advance else "r"
        )
        if advance:
            _check_advance(image, bitmap, cache)
        changed = write_overlay(
            image,
            lambda unit: changed_ranges(image, bitmap, unit),
            target,
            backing=os.fspath(backing),
            backing_format=backing_format,
            check_backing=check_backing,
            compress=compress,
            references=references,
            cache=cache,
            control=control,
            options=options,
        )
        if advance:
            if isinstance(target, str | bytes | os.PathLike):
                sync_directory(name)
            image.clear_bitmap(*_names(bitmap))
    control.end()
    return changed


def restore(
    increment: OpenSource | Image,
    target: OpenSource | Image,
    *,
    format: str | None = None,
    target_format: str | None = None,
    references: References = qemu_like,
    source_cache: CacheMode = "writeback",
    cache: CacheMode = "writeback",
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> None:
    """Apply one increment to *target*, which holds what the increment stands on.

    Only the layer *increment* is opened and read, not its backing file.  The
    target gets its size.  Cut off, the job is finished by calling it again.
    Raises: UsageError if *increment* has no backing file, so is a whole disk
    (which ``convert`` copies); Cancelled; any error of opening; StorageError.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    with ExitStack() as stack:
        image = _increment(stack, increment, format, source_cache)
        if not isinstance(target, Image):
            opened = open_image(target, "r+", format=target_format, references=references, cache=cache)
            target = stack.enter_context(opened)
        if target.size != image.size:
            target.resize(image.size, shrink=True)
        top = target.layers[0]
        sink = ImageTarget(target) if isinstance(top, Qcow2Image) else RawTarget(top.data)
        run_plan(_RestorePlan(image), Copier(sink, unit=0, keep_zeros=True), control)
        sink.finish()
    control.end()


def plan_restore(
    increment: OpenSource | Image,
    target: OpenSource | Image,
    *,
    format: str | None = None,
    target_format: str | None = None,
    references: References = qemu_like,
) -> RestorePlan:
    """Return what :func:`restore` of the same arguments does; *target* is opened for reading only.

    Raises: as :func:`restore`.
    """
    with ExitStack() as stack:
        image = _increment(stack, increment, format, "writeback")
        if not isinstance(target, Image):
            target = stack.enter_context(open_image(target, format=target_format, references=references))
        found = {COPY: 0, ZEROS: 0, BACKING: 0}
        for runs in _RestorePlan(image)._runs():
            for run in runs:
                found[run.status] += run.length
        return RestorePlan(found[COPY], found[ZEROS], target.size, image.size)


def _increment(stack: ExitStack, increment: OpenSource | Image, format: str | None, cache: CacheMode) -> Image:
    """Return the one layer that is to be applied, opened if it is not.  Raises: as :func:`restore`."""
    image = increment
    if not isinstance(image, Image):
        image = stack.enter_context(open_image(image, format=format, references=deny_all, cache=cache, backing=False))
    _check_increment(image)
    return image


def measure_backup(
    source: OpenSource | Image,
    bitmap: Bitmaps,
    *,
    source_format: str | None = None,
    references: References = qemu_like,
    force_share: bool = False,
    secret: Secrets | None = None,
    **options: object,
) -> Measurement:
    """Return how large :func:`backup` of *bitmap* makes its target, uncompressed, at most.

    ``required`` counts the clusters that hold data now, ``fully_allocated`` all
    that the bitmap touches; metadata is that of a whole image in both.
    """
    with ExitStack() as stack:
        image = _opened(stack, source, source_format, references, "writeback", force_share, secret)
        cluster = file_options(options, image.size).cluster_size
        metadata = measure(image.size, **cast("dict[str, Never]", options)).required
        data = touched = 0
        for start, end in changed_ranges(image, bitmap, cluster):
            touched += round_up(end, cluster) - start
            counted_to = 0
            while start < end:
                runs = image.map(start, end - start)
                count, counted_to = data_clusters(runs, cluster, counted_to)
                data += count
                start = runs.end
        return Measurement(metadata + data, metadata + touched)


def _opened(
    stack: ExitStack,
    source: OpenSource | Image,
    format: str | None,
    references: References,
    cache: CacheMode,
    force_share: bool,
    secret: Secrets | None,
    mode: Literal["r", "r+"] = "r",
) -> Image:
    if isinstance(source, Image):
        return source
    opened = open_image(
        source, mode, format=format, references=references, cache=cache, force_share=force_share, secret=secret
    )
    return stack.enter_context(opened)


def _check_increment(image: Image) -> None:
    """Refuse what holds no single increment: its holes would not be what is below.  Raises UsageError."""
    top = image.layers[0]
    if not isinstance(top, Qcow2Image) or not top.header.backing_file:
        raise UsageError("not an increment: it has no backing file", path=image.path)
    if len(image.layers) > 1:
        raise UsageError("an increment is opened without its backing file", path=image.path)


def _names(bitmap: Bitmaps) -> list[str]:
    return [bitmap] if isinstance(bitmap, str) else list(bitmap)


def _check_advance(image: Image, bitmap: Bitmaps, cache: CacheMode) -> None:
    """Refuse what could lose changes.  Raises UsageError."""
    if image.mode != "r+":
        raise UsageError("bitmaps of an image that is open read-only cannot be advanced", path=image.path)
    if cache == "unsafe":
        raise UsageError("a backup written with cache 'unsafe' is not durable: no bitmap is advanced", path=image.path)
    disabled = {each.name for each in image.bitmaps() if not each.enabled}
    for name in _names(bitmap):
        if name in disabled:
            raise UsageError(
                f"bitmap '{printable(name)}' is disabled: what it missed would be in no backup", path=image.path
            )


def changed_ranges(image: Image, bitmap: Bitmaps, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Return an iterator of ``(start, end)``: what the bitmaps have recorded, in whole *unit*s, joined, in order.

    Raises: UsageError for an unknown or inconsistent bitmap, at once.
    """
    names = _names(bitmap)
    if not names:
        raise UsageError("at least one bitmap is needed", path=image.path)
    # Found now, read later: a wrong name is an error before anything is made.
    return joined(heapq.merge(*[image.bitmap_extents(name) for name in names]), unit, image.size)


class _RestorePlan(Plan):
    """What one layer holds."""

    def __init__(self, image: Image) -> None:
        super().__init__([Source(image, 0)], unit=0, cluster=0, keep_zeros=True)

    def _runs(self) -> Iterator[list[Run]]:
        source = self.sources[0]
        image, offset = source.image, 0
        while offset < image.size:
            found = []
            for kind, guest, length, host, layer in image.map(offset, image.size - offset):
                status = BACKING if kind == HOLE else COPY if kind in (DATA, COMPRESSED) else ZEROS
                found.append(Run(status, guest, length, source, kind, guest, host, layer))
                offset = guest + length
            yield found
