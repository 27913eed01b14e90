# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Copying disks: one volume, a whole chain, or a chain collapsed into one volume.

Source and target may be of any two kinds.  Invariant: a target is ILLEGAL
from its first moment; when its last byte is durable one write makes it LEGAL,
one generation on.  It carries the note ``copy:<leaf>`` meanwhile: a copy is
there when that leaf is LEGAL, else :func:`recover_copies` removes what there
is of it.  What an error leaves is removed at once.  Bitmaps of a volume go
with it from version 4 on; those that were not saved are of no use and stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qcowlib.jobs.measure import measure

from . import metadata_volume as mv
from .copying import Progress, copy_disk, copy_layers, layers_size, no_progress
from .domain import Domain
from .errors import Illegal
from .ids import BLANK, make_id
from .image_group import ImageGroup
from .metadata_volume import COW, RAW, SHARED, SPARSE
from .sizes import copy_size
from .volume import VolumeSpec, create_volume, open_image, operation

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["arriving", "collapse", "copy_image", "make_template", "recover_copies"]

_NOTE: Final = "copy:"


def arriving(leaf: str) -> str:
    """Return the note of volumes that are filled from elsewhere and are worth nothing until *leaf* is LEGAL."""
    return f"{_NOTE}{leaf}"


def _copy_spec(
    source: Domain, target: Domain, volume: str, image: str, name: str, parent: str, *, leaf: bool
) -> VolumeSpec:
    record = source.record(volume)
    kind = record.type
    if target.block and record.format == RAW:
        kind = mv.PREALLOCATED
    initial = None
    if target.block and record.format == COW:
        initial = _needed(source, target, volume, record.capacity, child=parent != BLANK, leaf=leaf)
        if kind == mv.PREALLOCATED:
            initial = max(initial, record.capacity)
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


def _needed(source: Domain, target: Domain, volume: str, capacity: int, *, child: bool, leaf: bool) -> int:
    """Return the initial size on block storage of a copy of what one COW volume has of its own."""
    bitmaps = target.metadata.version >= 4
    with open_image(source, volume, backing=False) as image:
        # Version 2 images have no zero clusters: what hides data below is data.
        required = layers_size(image, 1, zeros=child and not bitmaps)
        extra = (measure(image).bitmaps or 0) if bitmaps and image.bitmaps() else 0
    return copy_size(required, capacity, COW, block=True, leaf=leaf, bitmaps=extra)


def copy_image(
    token: SpmToken,
    source: Domain,
    image: str,
    target: Domain,
    *,
    ctime: int,
    target_image: str | None = None,
    progress: Progress = no_progress,
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
            create_volume(token, target, spec, ctime, note=arriving(names[chain[0]]))
            made.append(spec.volume)
            role = SHARED if record.voltype == SHARED else None
            with operation(token, target, spec.volume, role=role):
                _copy_layer(token, source, volume, target, spec.volume, progress)
            parent = spec.volume
        target.set_notes(token, made, None)
    except BaseException:
        if made:
            _drop(token, target, new_image, made)
        raise
    return new_image


def _copy_layer(token: SpmToken, source: Domain, volume: str, target: Domain, name: str, progress: Progress) -> None:
    """Copy what one volume has of its own."""
    with (
        open_image(source, volume, backing=False) as before,
        open_image(target, name, writable=True, allow_illegal=True) as after,
    ):
        if after.format == "raw":
            # The whole disk; of others only their own clusters count.
            copy_disk(token, before, after, target_is_zero=not target.block, progress=progress)
        else:
            copy_layers(token, before, after, 1, progress=progress)
            # After the data, or the copying would be recorded.  A disk that grew gets a full backup next.
            if target.metadata.version >= 4 and before.size == after.size:
                token.check()
                after.copy_bitmaps(before, skip_broken=True)
                after.flush()


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
    role: str | None = None,
    progress: Progress = no_progress,
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
        with open_image(source, chain[0]) as whole:
            required = measure(whole).required
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
    create_volume(token, target, spec, ctime, note=arriving(volume))
    try:
        with (
            operation(token, target, volume, role=role),
            open_image(source, chain[0]) as before,
            open_image(target, volume, writable=True, allow_illegal=True) as after,
        ):
            # New files and images read as zeros; a RAW logical volume holds old data.
            copy_disk(token, before, after, target_is_zero=not (target.block and fmt == RAW), progress=progress)
        target.set_note(token, volume, None)
    except BaseException:
        _drop(token, target, new_image, [volume])
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
    progress: Progress = no_progress,
) -> tuple[str, str]:
    """Make a template of what a disk reads as; returns its image and UUID.

    Thin disks are then volumes whose parent it is
    (:func:`.volume.create_volume`), clones are :func:`collapse` of it.
    """
    return collapse(
        token, source, image, target, ctime=ctime, description=description, role=SHARED, leaf=leaf, progress=progress
    )


def recover_copies(token: SpmToken, domain: Domain) -> list[str]:
    """Remove copies and uploads into *domain* that were cut; returns the volumes that were removed."""
    copies: dict[tuple[str, str], list[str]] = {}
    for volume, note in sorted(domain.notes().items()):
        if note.startswith(_NOTE):
            image = domain.entries()[volume].images[0]
            copies.setdefault((image, note.removeprefix(_NOTE)), []).append(volume)
    removed = []
    for (image, leaf), volumes in copies.items():
        entry = domain.entries().get(leaf)
        there = entry is not None and not entry.removed and not entry.initializing
        if there and domain.record(leaf).legality == mv.LEGAL:
            domain.set_notes(token, volumes, None)
        else:
            _drop(token, domain, image, volumes)
            removed += volumes
    return removed


def _drop(token: SpmToken, domain: Domain, image: str, volumes: list[str]) -> None:
    """Remove what was copied; each volume has its note to its end, so this may be cut as well."""
    domain.mark_removed(token, image, volumes)
    domain.purge(token, image)
