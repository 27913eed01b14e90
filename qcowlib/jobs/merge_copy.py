# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The part of a merge that changes its target, in earnest or as a trial on a shadow.

Order: the target grows if the part shows more, the data is copied in guest
order and made durable piece by piece, the target is cut to the size that the
part shows, bitmaps are merged.

Invariants: at every moment the upper image shows what it showed before, since
what is written below it is what it shows there, or lies behind its end, so
that a copy that was cut may be taken up at any piece (L6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from qcowlib.image import open as open_image
from qcowlib.jobs.copy import Copier
from qcowlib.jobs.merge_plan import CopyPlan, pieces, valid_bitmaps
from qcowlib.jobs.pipeline import Control, run
from qcowlib.jobs.plan import COPY
from qcowlib.jobs.targets import Action, ImageTarget, RawTarget
from qcowlib.qcow2.bitmap import dirty_ranges
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.raw import RawImage
from qcowlib.storage.shadow import BLANK, ShadowStorage

if TYPE_CHECKING:
    from qcowlib.image import Image
    from qcowlib.jobs.pipeline import Turn
    from qcowlib.jobs.plan import Stretch
    from qcowlib.opening import Secrets

__all__ = ["Measured", "copy_layers", "fits", "measure_merge"]


class Measured(NamedTuple):
    """What a trial found: lengths in bytes, as :class:`~qcowlib.jobs.merge_plan.MergePlan` names them."""

    file_size: int
    required: int
    peak: int
    bitmaps: tuple[tuple[str, int], ...]
    lost_bitmaps: tuple[str, ...]


def copy_layers(
    source: Image,
    depth: int,
    target: Image,
    control: Control,
    *,
    end: int,
    start: int = 0,
    done: Callable[[int], object] | None = None,
    trial: bool = False,
) -> tuple[str, ...]:
    """Bring what the first *depth* layers of *source* hold into *target*, which then shows what *source* does.

    *end* is the size that the target had before the merge began.  *start* takes
    a copy up that was durable that far; *done* hears of each such point.
    Returns the names of bitmaps for which there is no room.
    """
    size = source.size
    if target.size < size:
        target.resize(size)
    below = target.layers[0]
    raw = isinstance(below, RawImage) and below.plain
    sink = RawTarget(below.data) if raw else ImageTarget(target)
    copier = Copier(sink, unit=0, keep_zeros=True, offload=below.data if raw else None)

    def blank(unit: list[Stretch], _: memoryview, turn: Turn) -> int:
        data = memoryview(BLANK)
        with turn:
            sink.place([Action(s.start, s.length, data[: s.length] if s.status == COPY else None) for s in unit])
        return 0

    for first, last in pieces(start, size):
        plan = CopyPlan(source, depth, end, first, last)
        work = blank if trial else copier.work
        run(plan.units(), work, control, buffer_size=plan.buffer, amount=control.total, ordered=sink.ordered)
        sink.finish()
        if done is not None:
            done(last)
    if target.size > size:
        _cut(target, size)
    lost = _merge_bitmaps(source, depth, target)
    target.flush()
    return lost


def fits(target: Image) -> bool:
    """Whether the target can be made shorter."""
    top = target.layers[0]
    if isinstance(top, Qcow2Image):
        return not (top.header.version == 2 and top.header.nb_snapshots)
    return not getattr(top.storage, "is_block", False)


def _cut(target: Image, size: int) -> None:
    """Let nothing show behind *size*: by the end of the image, or by zeros where that is fixed."""
    if fits(target):
        target.resize(size, shrink=True)
    else:
        target.zero(target.size - size, size)


def _merge_bitmaps(source: Image, depth: int, target: Image) -> tuple[str, ...]:
    """Merge the valid enabled bitmaps of each layer, the lowest first; returns those that have no room."""
    top = target.layers[0]
    room = isinstance(top, Qcow2Image) and top.header.version > 2
    lost: dict[str, None] = {}
    there = {bitmap.name: bitmap for bitmap in target.bitmaps()}
    for layer in reversed(source.layers[:depth]):
        for entry in valid_bitmaps(layer):
            name = entry.name.decode(errors="surrogateescape")
            if not room or (name in there and there[name].inconsistent):
                lost[name] = None
                continue
            if name not in there:
                target.add_bitmap(name, entry.granularity)
                there = {bitmap.name: bitmap for bitmap in target.bitmaps()}
            if isinstance(layer, Qcow2Image):
                target.record_bitmap(name, dirty_ranges(layer.storage, layer.header, entry))
    return tuple(lost)


def measure_merge(source: Image, depth: int, target: Image, shadow: ShadowStorage, secret: Secrets | None) -> Measured:
    """Carry the copy out on *target*, which stands on *shadow*; closes it."""
    top = target.layers[0]
    with target:
        if isinstance(top, Qcow2Image):
            # Nothing of the guest's is written, so there is nothing to encrypt.
            top.reader.cipher = None
        lost = copy_layers(source, depth, target, Control(workers=1), end=target.size, trial=True)
    # Closing saves bitmaps, which takes space too.
    with open_image(shadow, format=target.format, backing=False, secret=secret, lock=False) as result:
        bitmaps = tuple((bitmap.name, bitmap.granularity) for bitmap in result.bitmaps())
        required = result.check().image_end_offset if target.format == "qcow2" else result.size
    return Measured(shadow.size, required, max(shadow.reached, required), bitmaps, lost)
