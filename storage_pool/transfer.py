# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Copying disks: one volume, a whole chain, or a chain collapsed into one volume.

Source and target may be of any two kinds.  Invariant: a target is ILLEGAL
while its data are written; when its last byte is durable one write makes it
LEGAL, one generation on.  What an error leaves is removed where this call
made it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import qcowlib

from . import metadata_volume as mv
from .domain import Domain
from .errors import Illegal
from .ids import BLANK, make_id
from .image_group import ImageGroup
from .metadata_volume import COW, RAW, SHARED, SPARSE
from .sizes import copy_size
from .volume import VolumeSpec, create_volume, open_image, operation, remove_volumes, update_volume

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["collapse", "copy_data", "copy_image", "make_template"]

_PIECE = 4 << 20
Progress = Callable[[int, int], None]


def _no_progress(done: int, total: int) -> None:
    """Tell nobody."""


def copy_data(
    source: qcowlib.Image,
    target: qcowlib.Image,
    *,
    target_is_zero: bool,
    whole: bool = True,
    progress: Progress = _no_progress,
) -> None:
    """Make *target* read as *source*; zeros are not written to a target that *target_is_zero*.

    With *whole* false only what *source* has allocated is written, as for one
    layer of a chain.
    """
    buffer = bytearray(_PIECE)
    view = memoryview(buffer)
    total = source.size
    for extent in source.extents():
        start, end = extent.start, extent.start + extent.length
        if extent.kind in ("zero", "hole"):
            if not target_is_zero and (extent.present or whole):
                target.zero(extent.length, start)
            start = end
        while start < end:
            piece = view[: min(_PIECE, end - start)]
            source.preadinto(piece, start)
            target.pwrite(piece, start)
            start += len(piece)
            progress(start, total)
        progress(end, total)
    if whole and not target_is_zero and target.size > total:
        # A logical volume ends at an extent; what lies there is of others.
        target.zero(target.size - total, total)
    target.flush()


def _copy_spec(
    source: Domain, target: Domain, volume: str, image: str, name: str, parent: str, *, leaf: bool
) -> VolumeSpec:
    record = source.record(volume)
    kind = record.type
    if target.block and record.format == RAW:
        kind = mv.PREALLOCATED
    initial = None
    if target.block and record.format == COW:
        initial = copy_size(source.size_of(volume), record.capacity, COW, block=True, leaf=leaf)
    return VolumeSpec(
        image,
        name,
        record.capacity,
        record.format,
        kind,
        parent,
        record.disktype,
        record.description,
        initial_size=initial,
        # Readers must not see a volume as complete before its data are there.
        legality=mv.ILLEGAL,
        sequence=record.sequence,
    )


def copy_image(
    token: SpmToken,
    source: Domain,
    image: str,
    target: Domain,
    *,
    ctime: int,
    target_image: str | None = None,
    progress: Progress = _no_progress,
) -> str:
    """Copy a disk, volume by volume from its base on; returns the image made.

    Into another domain all UUIDs stay; within one domain, or with
    *target_image*, they are new.  A template below the disk must be in the
    target domain already.

    Raises: Illegal for a preview or an ILLEGAL volume, and what creation raises.
    """
    group = ImageGroup.load(source, image)
    chain = group.chain()
    for volume in chain:
        if group.records[volume].legality == mv.ILLEGAL:
            raise Illegal(f"the volume {volume} is ILLEGAL", path=source.name)
    renamed = target_image is not None or source.uuid == target.uuid
    new_image = target_image or (make_id() if renamed else image)
    names = {volume: make_id() if renamed else volume for volume in chain}
    made: list[str] = []
    parent = BLANK
    try:
        for volume in reversed(chain):
            record = group.records[volume]
            if record.voltype == SHARED and group.entries[volume].images[0] != image:
                # Another image's template is not copied, only used.
                parent = volume
                continue
            spec = _copy_spec(source, target, volume, new_image, names[volume], parent, leaf=volume == chain[0])
            if parent != BLANK:
                # A RAW base grew to whole extents, and a disk only grows upwards.
                spec = spec._replace(capacity=max(spec.capacity, target.record(parent).capacity))
            create_volume(token, target, spec, ctime)
            made.append(spec.volume)
            with operation(token, target, spec.volume):
                _copy_layer(source, volume, target, spec.volume, progress)
            if record.voltype == SHARED:
                update_volume(token, target, spec.volume, role=SHARED)
            parent = spec.volume
    except BaseException:
        if made:
            remove_volumes(token, target, new_image, made, force=True)
        raise
    return new_image


def _copy_layer(source: Domain, volume: str, target: Domain, name: str, progress: Progress) -> None:
    """Copy what one volume has of its own."""
    with (
        open_image(source, volume, backing=False) as before,
        open_image(target, name, writable=True, allow_illegal=True) as after,
    ):
        record = target.record(name)
        # A base that is RAW is the whole disk; of others only their own clusters count.
        whole = record.format == RAW
        fresh = whole and not target.block
        copy_data(before, after, target_is_zero=fresh, whole=whole, progress=progress)


def collapse(
    token: SpmToken,
    source: Domain,
    image: str,
    target: Domain,
    *,
    ctime: int,
    fmt: str = COW,
    kind: str = SPARSE,
    leaf: str | None = None,
    target_image: str | None = None,
    description: str | None = None,
    progress: Progress = _no_progress,
) -> tuple[str, str]:
    """Copy what a disk reads as into one new volume; returns its image and UUID.

    *leaf* names the volume to read (a snapshot, or one of two during a
    preview).  Raises: as :func:`copy_image`.
    """
    group = ImageGroup.load(source, image)
    chain = group.chain(leaf)
    record = group.records[chain[0]]
    new_image, volume = target_image or make_id(), make_id()
    initial = None
    if target.block and fmt == COW and kind == SPARSE:
        required = sum(source.size_of(layer) for layer in chain)
        initial = copy_size(required, record.capacity, COW, block=True, leaf=True)
    spec = VolumeSpec(
        new_image,
        volume,
        record.capacity,
        fmt,
        kind,
        BLANK,
        record.disktype,
        record.description if description is None else description,
        initial_size=initial,
        legality=mv.ILLEGAL,
    )
    create_volume(token, target, spec, ctime)
    try:
        with (
            operation(token, target, volume),
            open_image(source, chain[0]) as before,
            open_image(target, volume, writable=True, allow_illegal=True) as after,
        ):
            # New files and images read as zeros; a RAW logical volume holds old data.
            copy_data(before, after, target_is_zero=not (target.block and fmt == RAW), progress=progress)
    except BaseException:
        remove_volumes(token, target, new_image, [volume], force=True)
        raise
    return new_image, volume


def make_template(
    token: SpmToken,
    source: Domain,
    image: str,
    target: Domain,
    *,
    ctime: int,
    description: str | None = None,
    leaf: str | None = None,
    progress: Progress = _no_progress,
) -> tuple[str, str]:
    """Make a template of what a disk reads as; returns its image and UUID.

    Thin disks are then volumes whose parent it is
    (:func:`.volume.create_volume`), clones are :func:`collapse` of it.
    """
    made, volume = collapse(
        token, source, image, target, ctime=ctime, description=description, leaf=leaf, progress=progress
    )
    update_volume(token, target, volume, role=SHARED)
    return made, volume
