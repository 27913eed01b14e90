# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Snapshots of a disk: create, preview, undo and commit of a preview.

A snapshot is the volume that was the leaf; from then on a new leaf takes the
writes.  A preview is a second leaf on a snapshot beside the active one; undo
drops it, commit drops the active one and what stood between.  Deleting a
snapshot is a merge (:mod:`.merge`).

Invariant: until the last step, which is one removal, the disk as it was can
be had by undo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import metadata_volume as mv
from .domain import Domain
from .errors import Illegal
from .ids import check_id, make_id
from .image_group import ImageGroup
from .metadata_volume import COW, SPARSE
from .volume import VolumeSpec, create_volume, remove_volumes

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["commit_preview", "create_snapshot", "preview", "undo_preview"]


def _child(
    token: SpmToken,
    group: ImageGroup,
    parent: str,
    volume: str | None,
    capacity: int | None,
    ctime: int,
    *,
    copy_bitmaps: bool = False,
    new_bitmap: str | None = None,
) -> str:
    domain, record = group.domain, group.records[parent]
    name = volume or make_id()
    spec = VolumeSpec(
        group.image,
        name,
        capacity or record.capacity,
        COW,
        SPARSE,
        parent,
        record.disktype,
        record.description,
        # One more than any volume of the image has, also beside a preview.
        sequence=1 + max(other.sequence for other in group.records.values() if other.image == group.image),
        copy_bitmaps=copy_bitmaps,
        new_bitmap=new_bitmap,
    )
    create_volume(token, domain, spec, ctime)
    return name


def create_snapshot(
    token: SpmToken,
    domain: Domain,
    image: str,
    *,
    volume: str | None = None,
    capacity: int | None = None,
    ctime: int,
    copy_bitmaps: bool = False,
    new_bitmap: str | None = None,
) -> str:
    """Take a snapshot of a disk that nobody writes; returns the new leaf.

    The present leaf is the snapshot.  *capacity* may make the disk larger.
    *copy_bitmaps* lets its dirty bitmaps go on in the new leaf, each empty;
    *new_bitmap* begins one.

    Raises: Illegal during a preview, MetadataError for a broken chain.
    """
    group = ImageGroup.load(domain, image)
    leaf = group.leaf()
    group.chain(leaf)
    return _child(token, group, leaf, volume, capacity, ctime, copy_bitmaps=copy_bitmaps, new_bitmap=new_bitmap)


def preview(
    token: SpmToken, domain: Domain, image: str, snapshot: str, *, volume: str | None = None, ctime: int
) -> str:
    """Make a second leaf on *snapshot* and return it; the active leaf stays as it is.

    Raises: Illegal when there is a preview already or *snapshot* is the leaf.
    """
    group = ImageGroup.load(domain, image)
    leaf = group.leaf()
    if check_id(snapshot, "volume UUID") == leaf or snapshot not in group.chain(leaf):
        raise Illegal(f"the volume {snapshot} is no snapshot of the image", path=domain.name)
    return _child(token, group, snapshot, volume, None, ctime)


def _active_leaf(group: ImageGroup, previewed: str) -> str:
    others = [leaf for leaf in group.leaves() if leaf != previewed]
    if previewed not in group.leaves() or len(others) != 1:
        raise Illegal(f"the volume {previewed} is no preview of the image", path=group.domain.name)
    return others[0]


def undo_preview(token: SpmToken, domain: Domain, image: str, previewed: str, *, zero: bool = False) -> None:
    """Drop a preview, with *zero* after overwriting its data; the disk is what it was.  Raises: Illegal."""
    _active_leaf(ImageGroup.load(domain, image), previewed)
    remove_volumes(token, domain, image, [previewed], zero=zero)


def commit_preview(token: SpmToken, domain: Domain, image: str, previewed: str, *, zero: bool = False) -> list[str]:
    """Make the preview the disk: drop the active leaf and all between; returns what was dropped.

    With *zero* the data of what is dropped are overwritten before.

    Raises: Illegal.
    """
    group = ImageGroup.load(domain, image)
    active = _active_leaf(group, previewed)
    kept = set(group.chain(previewed))
    dropped = [volume for volume in group.chain(active) if volume not in kept]
    for volume in dropped:
        if group.records[volume].voltype == mv.SHARED:
            raise Illegal(f"the volume {volume} is a template", path=domain.name)
    remove_volumes(token, domain, image, dropped, zero=zero)
    return dropped
