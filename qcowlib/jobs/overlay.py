# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A new overlay that holds given ranges of an image, and nothing else.

Invariants: the overlay holds every cluster that a range touches, as the source
has it now, zeros as zeros, so that nothing of the backing file shows through
there; it has no magic until all of it is durable (I11), and is removed if the
job fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from qcowlib.driver import COMPRESSED, DATA
from qcowlib.errors import UnsupportedFeature
from qcowlib.jobs.copy import Copier
from qcowlib.jobs.creation import file_options, new_storage, open_backing
from qcowlib.jobs.pipeline import Control, run
from qcowlib.jobs.plan import COPY, ZEROS, Plan, Run, Source
from qcowlib.jobs.targets import BuildTarget
from qcowlib.qcow2.create import new_header
from qcowlib.units import KiB, round_down, round_up

if TYPE_CHECKING:
    from qcowlib.gate import References
    from qcowlib.image import CacheMode, Image
    from qcowlib.qcow2.create import CreateOptions
    from qcowlib.storage.base import Storage

__all__ = ["joined", "run_plan", "write_overlay"]

_ZERO_UNIT = 4 * KiB


def write_overlay(
    image: Image,
    ranges: Callable[[int], Iterator[tuple[int, int]]],
    target: str | bytes | os.PathLike[str] | Storage,
    *,
    backing: str,
    backing_format: str,
    check_backing: bool,
    compress: bool,
    references: References,
    cache: CacheMode,
    control: Control,
    options: Mapping[str, object],
) -> int:
    """Write what ``ranges(cluster size)`` yields, in whole clusters, of *image* to *target*; returns the guest bytes.

    Raises: UsageError, UnsupportedFeature, any error of opening the backing
    file, before anything is written; Cancelled; StorageError.
    """
    name = os.fsdecode(target) if isinstance(target, str | bytes | os.PathLike) else target.name
    described = file_options(options, image.size, backing=backing, backing_format=backing_format)
    header = new_header(described)
    _check_target(described, name)
    found = ranges(described.cluster_size)
    if check_backing:
        open_backing(backing, backing_format, name, references)
    with new_storage(target, cache) as storage:
        plan = _RangePlan(image, found, described.cluster_size, compress)
        sink = BuildTarget(storage, header, data=None, zeroed=not getattr(storage, "is_block", False))
        run_plan(plan, _copier(sink, described, compress), control)
        sink.finish()
    return plan.changed


def _check_target(described: CreateOptions, name: str) -> None:
    """Refuse what a backup cannot be.  Raises UnsupportedFeature."""
    if described.data_file is not None or described.preallocation != "off" or described.encrypt is not None:
        raise UnsupportedFeature("a backup is one plain file without preallocation", path=name)
    if described.version < 3 or described.extended_l2:
        raise UnsupportedFeature("a backup needs zero clusters: version 3, without extended L2 entries", path=name)


def _copier(sink: BuildTarget, described: CreateOptions, compress: bool) -> Copier:
    codec = None
    if compress:
        from qcowlib.codec import Codec

        codec = Codec(described.compression_type, described.cluster_size)
    return Copier(
        sink, unit=_ZERO_UNIT, keep_zeros=True, cluster=described.cluster_size, compress=compress, codec=codec
    )


def joined(ranges: Iterator[tuple[int, int]], cluster: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, end)`` of *ranges* ``(offset, length)``, which ascend, widened to whole clusters and joined."""
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


def run_plan(plan: Plan, copier: Copier, control: Control) -> None:
    """Carry out *plan*."""
    control.begin(plan.amount() if control.wanted else plan.total)
    ordered = copier.target.ordered
    run(plan.units(), copier.work, control, buffer_size=plan.buffer, amount=control.total, ordered=ordered)


class _RangePlan(Plan):
    """Whole clusters of *ranges*; what is between them is left to the backing file."""

    def __init__(self, image: Image, ranges: Iterator[tuple[int, int]], cluster: int, compress: bool) -> None:
        super().__init__([Source(image, 0)], unit=_ZERO_UNIT, cluster=cluster, keep_zeros=True, single=compress)
        self._ranges = list(ranges)
        #: Guest bytes that the target stores.
        self.changed = sum(end - start for start, end in self._ranges)

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
