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

Each overlay with its chain is the disk of its day, so ``convert`` of the newest
one restores everything; :func:`restore` applies one increment to an image that
holds the day before.

Invariants: the overlay holds every cluster that a bitmap touches, as the source
has it now, zeros as zeros, so that nothing older shows through; it has no magic
until all of it is durable (I11), and is removed if the job fails.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, cast

from qcowlib.driver import COMPRESSED, DATA, HOLE
from qcowlib.errors import UnsupportedFeature, UsageError
from qcowlib.gate import References, deny_all, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.copy import Copier
from qcowlib.jobs.creation import file_options, new_storage, open_backing
from qcowlib.jobs.measure import Measurement, measure
from qcowlib.jobs.pipeline import DEFAULT_MEMORY, Control, run
from qcowlib.jobs.plan import BACKING, COPY, ZEROS, Plan, Run, Source
from qcowlib.jobs.targets import BuildTarget, ImageTarget, RawTarget
from qcowlib.native import data_clusters
from qcowlib.qcow2.create import new_header
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.units import KiB, round_down, round_up

if TYPE_CHECKING:
    from typing import Never

    from qcowlib.image import CacheMode
    from qcowlib.opening import Source as OpenSource
    from qcowlib.storage.base import Storage

__all__ = ["backup", "measure_backup", "restore"]

_ZERO_UNIT = 4 * KiB

Bitmaps = str | Sequence[str]


def backup(
    source: OpenSource | Image,
    target: str | bytes | os.PathLike[str] | Storage,
    bitmap: Bitmaps,
    *,
    backing: str | os.PathLike[str],
    backing_format: str,
    source_format: str | None = None,
    compress: bool = False,
    check_backing: bool = True,
    references: References = qemu_like,
    source_cache: CacheMode = "writeback",
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: str | bytes | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    **options: object,
) -> None:
    """Write what *bitmap* (or any of several) of *source* has recorded to a new overlay *target* over *backing*.

    *backing*, stored as given, is the backup that was complete when the bitmap
    began; with *check_backing* it must be there.  Whole clusters of the target
    are stored, read from the source.  Nobody may write to the source meanwhile.
    *options* are :class:`~qcowlib.jobs.creation.NewOptions` of the target, the
    five before them those of :class:`~qcowlib.jobs.pipeline.Control`.

    Raises: UsageError for an unknown or inconsistent bitmap, before anything
    is written; Cancelled; any error of opening; StorageError.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    name = os.fsdecode(target) if isinstance(target, str | bytes | os.PathLike) else target.name
    with ExitStack() as stack:
        image = _opened(stack, source, source_format, references, source_cache, force_share, secret)
        stored = os.fspath(backing)
        described = file_options(options, image.size, backing=stored, backing_format=backing_format)
        header = new_header(described)
        if described.data_file is not None or described.preallocation != "off" or described.encrypt is not None:
            raise UnsupportedFeature("a backup is one plain file without preallocation", path=name)
        if described.version < 3 or described.extended_l2:
            raise UnsupportedFeature("a backup needs zero clusters: version 3, without extended L2 entries", path=name)
        ranges = _ranges(image, bitmap, described.cluster_size)
        if check_backing:
            open_backing(stored, backing_format, name, references)
        storage = stack.enter_context(new_storage(target, cache))
        plan = _BackupPlan(image, ranges, described.cluster_size, compress)
        sink = BuildTarget(storage, header, data=None, zeroed=not getattr(storage, "is_block", False))
        codec = None
        if compress:
            from qcowlib.codec import Codec

            codec = Codec(described.compression_type, described.cluster_size)
        copier = Copier(
            sink, unit=_ZERO_UNIT, keep_zeros=True, cluster=described.cluster_size, compress=compress, codec=codec
        )
        _run(plan, copier, control)
        sink.finish()
    control.end()


def restore(
    increment: OpenSource,
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

    Only the layer *increment* is opened, not its backing file.  The target gets
    its size.  Cut off, the job is finished by calling it again.
    Raises: Cancelled; any error of opening; StorageError.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    with ExitStack() as stack:
        image = stack.enter_context(
            open_image(increment, format=format, references=deny_all, cache=source_cache, backing=False)
        )
        if not isinstance(target, Image):
            opened = open_image(target, "r+", format=target_format, references=references, cache=cache)
            target = stack.enter_context(opened)
        if target.size != image.size:
            target.resize(image.size, shrink=True)
        top = target.layers[0]
        sink = ImageTarget(target) if isinstance(top, Qcow2Image) else RawTarget(top.data)
        _run(_RestorePlan(image), Copier(sink, unit=0, keep_zeros=True), control)
        sink.finish()
    control.end()


def measure_backup(
    source: OpenSource | Image,
    bitmap: Bitmaps,
    *,
    source_format: str | None = None,
    references: References = qemu_like,
    force_share: bool = False,
    secret: str | bytes | None = None,
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
        for start, end in _ranges(image, bitmap, cluster):
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
    secret: str | bytes | None,
) -> Image:
    if isinstance(source, Image):
        return source
    return stack.enter_context(
        open_image(source, format=format, references=references, cache=cache, force_share=force_share, secret=secret)
    )


def _ranges(image: Image, bitmap: Bitmaps, cluster: int) -> Iterator[tuple[int, int]]:
    """Return an iterator of ``(start, end)``: what the bitmaps touch, in whole clusters, joined, in order."""
    names = [bitmap] if isinstance(bitmap, str) else list(bitmap)
    if not names:
        raise UsageError("at least one bitmap is needed", path=image.path)
    # Found now, read later: a wrong name is an error before anything is made.
    return _joined(heapq.merge(*[image.bitmap_extents(name) for name in names]), cluster, image.size)


def _joined(ranges: Iterator[tuple[int, int]], cluster: int, size: int) -> Iterator[tuple[int, int]]:
    start = end = 0
    for offset, length in ranges:
        low, high = round_down(offset, cluster), min(round_up(offset + length, cluster), size)
        if low > end:
            if start < end:
                yield start, end
            start = low
        end = max(end, high)
    if start < end:
        yield start, end


def _run(plan: Plan, copier: Copier, control: Control) -> None:
    control.begin(plan.amount() if control.wanted else plan.total)
    ordered = copier.target.ordered
    run(plan.units(), copier.work, control, buffer_size=plan.buffer, amount=control.total, ordered=ordered)


class _BackupPlan(Plan):
    """Whole clusters of *ranges*; what is between them is left to the backing file."""

    def __init__(self, image: Image, ranges: Iterator[tuple[int, int]], cluster: int, compress: bool) -> None:
        super().__init__([Source(image, 0)], unit=_ZERO_UNIT, cluster=cluster, keep_zeros=True, single=compress)
        self._ranges = list(ranges)

    def _runs(self) -> Iterator[list[Run]]:
        source = self.sources[0]
        for start, end in self._ranges:
            while start < end:
                found = []
                for kind, guest, length, host, layer in source.image.map(start, end - start):
                    status = COPY if kind in (DATA, COMPRESSED) else ZEROS
                    found.append(Run(status, guest, length, source, kind, guest, host, layer))
                    start = guest + length
                yield found


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
