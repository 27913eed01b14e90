# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Deleting a snapshot: the data of *top* go down into *base*, its parent, and *top* goes.

Steps, each of which may be run again:

1. base has room for top; note "merge:<top>" on base, from then on :func:`recover_merges` ends it;
   ":zero" after it where what goes is overwritten first
2. base becomes ILLEGAL and has the capacity of top
3. top's data are written into base
4. top becomes ILLEGAL
5. what stood on top stands on base: image, then record, then tag
6. base becomes LEGAL, one generation on, LEAF if top was the leaf
7. base gives back space, top is removed, the note is taken away

Invariant: at every cut the disk reads as before: until 5 through top, whose
data are complete, then through base, which is complete since 3.  Nobody
opens the disk meanwhile, for base is ILLEGAL.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Final

from qcowlib.errors import Busy, Error
from qcowlib.jobs.measure import measure
from qcowlib.qcow2.check import check

from . import metadata_volume as mv
from .copying import carry_bitmaps, copy_layers, layers_size
from .domain import Domain
from .errors import Illegal, LvmError, NotFound
from .image_group import ImageGroup
from .metadata_volume import COW, RAW, SHARED, SPARSE, VolumeMetadata
from .opening import backing_of
from .sizes import CHUNK, max_size, optimal_cow_size
from .volume import (
    ZERO_NOTE,
    children_of,
    open_image,
    remove_volumes,
    set_parent_name,
    set_role,
    volume_of_name,
    zero_from,
)

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["check_merge", "merge", "recover_merges", "sync_chain"]

_NOTE: Final = "merge:"


def check_merge(group: ImageGroup, top: str) -> tuple[str, str | None]:
    """Return base and child (``None`` when top is the leaf) of a merge that may be done.

    Raises: Illegal for shared volumes, ILLEGAL members, and a base with other
    children; NotFound, MetadataError for a broken chain.
    """
    domain = group.domain
    if top not in group.records:
        raise NotFound(f"there is no volume {top} in image {group.image}", path=domain.name)
    chains = [chain for chain in map(group.chain, group.leaves()) if top in chain]
    if len(chains) != 1:
        raise Illegal(f"the volume {top} is in {len(chains)} chains", path=domain.name)
    chain = chains[0]
    position = chain.index(top)
    if position + 1 == len(chain):
        raise Illegal(f"the volume {top} has no parent to merge into", path=domain.name)
    base, child = chain[position + 1], chain[position - 1] if position else None
    for volume in (base, top):
        if group.records[volume].voltype == SHARED:
            raise Illegal(f"the volume {volume} is a template", path=domain.name)
    for volume in chain:
        if group.records[volume].legality != mv.LEGAL:
            raise Illegal(f"the volume {volume} is {group.records[volume].legality}", path=domain.name)
    if others := set(children_of(domain, base)) - {top}:
        raise Illegal(f"the volume {base} has other children: {', '.join(sorted(others))}", path=domain.name)
    return base, child


def merge(token: SpmToken, domain: Domain, image: str, top: str, *, zero: bool = False) -> str:
    """Merge *top* into its parent and remove it; returns the parent.

    With *zero* the data of *top*, and what the parent gives back, are
    overwritten before others can have their space.  The disk must not be in
    use.  A cut is ended by :func:`recover_merges`.

    Raises: Illegal, NotFound, MetadataError, NoSpace, StorageError.
    """
    group = ImageGroup.load(domain, image)
    base, _ = check_merge(group, top)
    # First, for a full group must be told before anything is changed.
    _make_room(token, domain, base, group.records[base], top, group.records[top])
    domain.set_note(token, base, f"{_NOTE}{top}{ZERO_NOTE if zero else ''}")
    _finish(token, domain, image, base, top, roomy=True, zero=zero)
    return base


def sync_chain(token: SpmToken, domain: Domain, image: str, actual: Sequence[str]) -> list[str]:
    """Let records follow a merge that a running guest made; returns the volumes that were changed.

    *actual* is what the guest has open, from its leaf down to the base.  A
    leaf that it left is ILLEGAL from then on, and LEGAL again when it is back;
    what stood on a volume that is gone from the middle stands on what its
    image names.  What is gone itself is left for removal.

    Raises: Illegal for anything that is not the recorded chain less some of
    its volumes, and for an image that names another parent; NotFound.
    """
    group = ImageGroup.load(domain, image)
    recorded = group.chain()
    kept = [volume for volume in recorded if volume in actual]
    if kept != list(actual) or not kept or kept[-1] != recorded[-1]:
        raise Illegal(f"the image {image} has no such chain of {len(actual)} volumes", path=domain.name)
    leaf = group.records[recorded[0]]
    if recorded[0] != kept[0]:
        if leaf.legality == mv.ILLEGAL:
            return []
        domain.write_record(token, recorded[0], leaf._replace(legality=mv.ILLEGAL))
        return recorded[:1]
    moved = [(volume, parent) for volume, parent in itertools.pairwise(kept) if group.records[volume].parent != parent]
    for volume, parent in moved:
        with closing(domain.open_volume(volume)) as storage:
            name, _ = backing_of(storage)
        if name is None or volume_of_name(name) != parent:
            raise Illegal(f"the image of {volume} does not stand on {parent}", path=domain.name)
    for volume, parent in moved:
        domain.write_record(token, volume, group.records[volume]._replace(parent=parent))
        domain.set_parent_hint(token, volume, parent)
    if not moved and leaf.legality == mv.ILLEGAL:
        domain.write_record(token, kept[0], leaf._replace(legality=mv.LEGAL))
        return kept[:1]
    return [volume for volume, _ in moved]


def recover_merges(token: SpmToken, domain: Domain) -> list[str]:
    """End all merges that were cut; returns the volumes that were merged into."""
    domain.refresh()
    ended = []
    for base, note in sorted(domain.notes().items()):
        if note.startswith(_NOTE):
            top = note.removeprefix(_NOTE).removesuffix(ZERO_NOTE)
            _finish(token, domain, domain.record(base).image, base, top, zero=note.endswith(ZERO_NOTE))
            ended.append(base)
    return ended


def _finish(
    token: SpmToken, domain: Domain, image: str, base: str, top: str, *, roomy: bool = False, zero: bool = False
) -> None:
    entry = domain.entries().get(top)
    live = entry is not None and not entry.removed and not entry.initializing
    if live:
        top_record = domain.record(top)
        if top_record.legality == mv.LEGAL:
            _prepare(token, domain, base, top, top_record, roomy=roomy)
            _commit(token, domain, base, top)
            domain.write_record(token, top, top_record._replace(legality=mv.ILLEGAL))
        _relink(token, domain, base, top)
    record = domain.record(base)
    if record.legality == mv.ILLEGAL:
        remaining = set(children_of(domain, base)) - {top}
        role = mv.INTERNAL if remaining else mv.LEAF
        done = record._replace(legality=mv.LEGAL, generation=mv.next_generation(record.generation))
        set_role(token, domain, base, done, role)
    _reduce(token, domain, base, zero=zero)
    if live:
        remove_volumes(token, domain, image, [top], zero=zero, force=True)
    domain.purge(token, image)
    domain.set_note(token, base, None)


def _make_room(
    token: SpmToken, domain: Domain, base: str, record: VolumeMetadata, top: str, top_record: VolumeMetadata
) -> None:
    if record.format == RAW:
        domain.extend(token, base, top_record.capacity)
    elif domain.block:
        domain.extend(token, base, _needed(domain, base, record, top, top_record))


def _prepare(token: SpmToken, domain: Domain, base: str, top: str, top_record: VolumeMetadata, *, roomy: bool) -> None:
    record = domain.record(base)
    if record.legality == mv.LEGAL:
        if domain.metadata.version < 3:
            domain.set_writable(token, [base], True)
        record = record._replace(legality=mv.ILLEGAL)
        domain.write_record(token, base, record)
    if not roomy:
        _make_room(token, domain, base, record, top, top_record)
    if domain.block and record.format == RAW and record.capacity < top_record.capacity:
        # New extents hold what they held; where top has nothing the disk reads zeros.
        zero_from(token, domain, base, record.capacity)
    if record.capacity < top_record.capacity:
        domain.write_record(token, base, record._replace(capacity=top_record.capacity))


def _enough(domain: Domain, base: str, top: str, capacity: int) -> int:
    """Return a size in which all of both fits for certain, and not more than such a volume can need."""
    return min(domain.size_of(base) + domain.size_of(top), max_size(capacity, COW, block=True))


def _needed(domain: Domain, base: str, record: VolumeMetadata, top: str, top_record: VolumeMetadata) -> int:
    """Return the size of a COW base on block storage that takes top: what both hold, and what lies unused in base."""
    # Version 2 images have no zero clusters: what hides data below is data.
    zeros = domain.metadata.version < 4
    with open_image(domain, top, allow_illegal=True) as image:
        both = layers_size(image, 2, zeros=zeros) + (measure(image).bitmaps or 0)
    with open_image(domain, base, allow_illegal=True, backing=False) as image:
        alone = layers_size(image, 1, zeros=zeros)
    storage = domain.open_volume(base)
    try:
        report = check(storage)
    finally:
        storage.close()
    enough = _enough(domain, base, top, top_record.capacity)
    if report.failure or not report.image_end_offset:
        return enough
    room = CHUNK if top_record.voltype == mv.LEAF else 0
    return min(both + max(0, report.image_end_offset - alone) + room, enough)


def _commit(token: SpmToken, domain: Domain, base: str, top: str) -> None:
    """Write what top has into base; again and again is the same as once."""
    try:
        _write(token, domain, base, top)
    except Error:
        enough = _enough(domain, base, top, domain.record(top).capacity)
        if not domain.block or domain.record(base).format == RAW or domain.size_of(base) >= enough:
            raise
        # The reckoning was short of something in the image that it does not know.
        domain.extend(token, base, enough)
        _write(token, domain, base, top)


def _write(token: SpmToken, domain: Domain, base: str, top: str) -> None:
    with (
        open_image(domain, top, backing=False) as source,
        open_image(domain, base, writable=True, allow_illegal=True) as target,
    ):
        if target.format != "raw" and target.size < source.size:
            token.check()
            target.resize(source.size)
        copy_layers(token, source, target, 1)
        if target.format != "raw" and domain.metadata.version >= 4:
            token.check()
            carry_bitmaps(source, target)


def _relink(token: SpmToken, domain: Domain, base: str, top: str) -> None:
    """Let what stands on top stand on base: image first, then record, then tag."""
    fmt = domain.record(base).format
    for child in children_of(domain, top):
        set_parent_name(token, domain, child, base, fmt)
        domain.write_record(token, child, domain.record(child)._replace(parent=base))
    for child in children_of(domain, base):
        domain.set_parent_hint(token, child, base)


def _reduce(token: SpmToken, domain: Domain, base: str, *, zero: bool) -> None:
    """Give back what an internal volume does not need; not for files and preallocated volumes."""
    record = domain.record(base)
    if not domain.block or record.format != COW or record.type != SPARSE or record.voltype == mv.LEAF:
        return
    storage = domain.open_volume(base)
    try:
        report = check(storage)
    finally:
        storage.close()
    if report.failure or not report.image_end_offset:
        # The merge is done; space is no reason to undo it.
        return
    size = optimal_cow_size(report.image_end_offset, record.capacity, leaf=False)
    try:
        domain.reduce(token, base, size, zero=zero)
    except (Busy, LvmError):
        # Nor is that it is in use; what it does not need stays its own.
        return
