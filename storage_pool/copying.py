# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Data from one open image into another: whole disks, or the layers above a given one.

The engine's copying does the work: what a map knows to be zero is not read,
reads run side by side with writes.  Invariant: written again it gives the
same, so a copy that was cut is done once more from its start; the target is
durable on return.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import qcowlib
from qcowlib.driver import COMPRESSED, DATA, HOLE, ZERO
from qcowlib.jobs.copy import Copier
from qcowlib.jobs.measure import measure
from qcowlib.jobs.pipeline import Control, run
from qcowlib.jobs.plan import BACKING, COPY, ZEROS, Plan, Run, Source
from qcowlib.jobs.targets import ImageTarget, RawTarget
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.units import round_down, round_up

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["Progress", "carry_bitmaps", "copy_disk", "copy_layers", "good_bitmaps", "layers_size", "no_progress"]

Progress = Callable[[int, int], object]

#: Zeros of this many bytes in data are not written where the target reads as zeros.
_ZERO_UNIT = 4096
#: Cluster size of the images that domains hold.
_CLUSTER = 65536


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


class _LayersPlan(Plan):
    """What the first *depth* layers hold; holes among them that hide what is below, which ends at *end*, are zeros."""

    def __init__(self, image: qcowlib.Image, depth: int, end: int) -> None:
        super().__init__([Source(image, 0)], unit=0, cluster=0, keep_zeros=True)
        self._depth = depth
        self._end = end

    def _runs(self) -> Iterator[list[Run]]:
        source = self.sources[0]
        image, offset = source.image, 0
        while offset < image.size:
            found = []
            for kind, guest, length, host, layer in image.map(offset, image.size - offset):
                if layer >= self._depth or (kind == HOLE and guest >= self._end):
                    status = BACKING
                else:
                    status = COPY if kind in (DATA, COMPRESSED) else ZEROS
                found.append(Run(status, guest, length, source, kind, guest, host, layer))
                offset = guest + length
            yield found


def _carry_out(token: SpmToken, plan: Plan, target: qcowlib.Image, *, unit: int, progress: Progress) -> None:
    def stop() -> bool:
        # Asked before each unit; the token says it by an error.
        token.check()
        return False

    top = target.layers[0]
    sink = ImageTarget(target) if isinstance(top, Qcow2Image) else RawTarget(top.data)
    copier = Copier(sink, unit=unit, keep_zeros=plan.keep_zeros)
    control = Control(progress=progress, cancel=stop)
    control.begin(plan.amount())
    run(plan.units(), copier.work, control, buffer_size=plan.buffer, amount=control.total, ordered=sink.ordered)
    sink.finish()
    control.end()


def copy_disk(
    token: SpmToken,
    source: qcowlib.Image,
    target: qcowlib.Image,
    *,
    target_is_zero: bool,
    progress: Progress = no_progress,
) -> None:
    """Make *target*, which is not smaller, read as *source* and as zeros behind its end.

    Zeros are not written to a target that *target_is_zero*.
    """
    plan = Plan([Source(source, 0)], unit=_ZERO_UNIT, cluster=0, keep_zeros=not target_is_zero)
    _carry_out(token, plan, target, unit=_ZERO_UNIT, progress=progress)
    if not target_is_zero and target.size > source.size:
        # A logical volume ends at an extent; what lies there is of others.
        target.zero(target.size - source.size, source.size)
        target.flush()


def copy_layers(
    token: SpmToken,
    source: qcowlib.Image,
    target: qcowlib.Image,
    depth: int,
    *,
    below: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Write what the first *depth* layers of *source* hold into *target*, and nothing else.

    *below* is the size of what *target* stands on when *source* was opened
    with all its layers; a layer that was opened alone has nothing to hide.
    """
    _carry_out(token, _LayersPlan(source, depth, below), target, unit=0, progress=progress)


def layers_size(image: qcowlib.Image, depth: int, *, zeros: bool = False) -> int:
    """Return the bytes that a new COW image needs for what the first *depth* layers of *image* hold.

    With *zeros* ranges that read as zeros count as data.
    """
    used = end = offset = 0
    kinds = (DATA, COMPRESSED, ZERO) if zeros else (DATA, COMPRESSED)
    while offset < image.size:
        for kind, guest, length, _, layer in image.map(offset, image.size - offset):
            offset = guest + length
            if layer < depth and kind in kinds:
                start = max(end, round_down(guest, _CLUSTER))
                end = max(end, round_up(offset, _CLUSTER))
                used += end - start
    return measure(image.size).required + used


def good_bitmaps(image: qcowlib.Image) -> list[str]:
    """Return the names of an image's bitmaps that record, and were saved."""
    return [one.name for one in image.bitmaps() if one.enabled and not one.inconsistent]


def carry_bitmaps(source: qcowlib.Image, target: qcowlib.Image, names: Collection[str] | None = None) -> list[str]:
    """Let bitmaps of *target* also record what those of *source* have (all, or *names*); returns their names.

    Both are single layers of one size.  Bitmaps that are disabled or were not
    saved are of no use to anybody: those of the target are removed, those of
    the source left.  Done again it gives the same.
    """
    for one in target.bitmaps():
        if one.inconsistent or not one.enabled:
            target.remove_bitmap(one.name)
    present = {one.name for one in target.bitmaps()}
    carried = []
    for one in source.bitmaps():
        if one.inconsistent or not one.enabled or (names is not None and one.name not in names):
            continue
        if one.name not in present:
            target.add_bitmap(one.name, one.granularity)
        target.merge_bitmap(one.name, one.name, source)
        carried.append(one.name)
    return carried
