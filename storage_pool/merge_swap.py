# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Deleting a snapshot as the technical reference has it for older versions: a merged volume, swapped in.

The snapshot's volume *base* and its one child *top* become one volume under
*top*'s name; what stood on *top* needs no other backing name.  Steps:

1. note ``swap:<top>:<slot>`` on base, top becomes ILLEGAL; ``:zero`` after it where what goes is overwritten first
2. the merged volume ``<top>_MERGE`` is made, on the parent of base, and filled
3. note ``swapped:...`` on base
4. by renames it takes the place of top, whose old bytes are out of sight; on a V1 volume group its record went before
5. the record of top: parent, format; images on top where its format changed
6. top is LEGAL, one generation on
7. the old bytes go, and base

Invariant: before 3 recovery takes all back, from then on it ends all; the
bytes of base and of the old top are untouched until 6 is durable.  A merge
:func:`into the base <storage_pool.merge.merge>` copies less where base is
the larger one and keeps the name of base; this one never writes into a
volume that a reader may have open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import qcowlib
from qcowlib.qcow2.create import create, create_raw

from . import metadata_volume as mv
from .copying import carry_bitmaps, copy_disk, copy_layers, good_bitmaps, layers_size
from .domain import Domain
from .errors import Illegal, NotFound
from .ids import BLANK
from .image_group import ImageGroup
from .merge import check_merge
from .metadata_volume import COW, PREALLOCATED, RAW, SPARSE, VolumeMetadata
from .sizes import CHUNK, max_size
from .twin import drop_twin, make_twin, open_twin, swap_twin
from .volume import (
    IMAGE_FORMATS,
    ZERO_NOTE,
    DomainReferences,
    children_of,
    image_options,
    open_image,
    remove_volumes,
    set_parent_name,
    set_role,
)

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["merge_by_swap", "recover_swaps"]

_NOTE: Final = "swap:"
_DONE_NOTE: Final = "swapped:"


def merge_by_swap(token: SpmToken, domain: Domain, image: str, snapshot: str, *, zero: bool = False) -> str:
    """Delete *snapshot*: its data and those of its child become one volume; returns the child.

    With *zero* the bytes of both are overwritten before others can have their
    space.  The disk must not be in use.  A cut is ended or taken back by
    :func:`recover_swaps`.

    Raises: Illegal (also for a snapshot with several children or none),
    NotFound, MetadataError, NoSpace, StorageError.
    """
    group = ImageGroup.load(domain, image)
    if snapshot not in group.records:
        raise NotFound(f"there is no volume {snapshot} in image {image}", path=domain.name)
    children = children_of(domain, snapshot)
    if len(children) != 1:
        raise Illegal(f"the volume {snapshot} has {len(children)} children", path=domain.name)
    (top,) = children
    check_merge(group, top)
    slot = domain.entries()[top].slot or 0
    end = f"{top}:{slot}{ZERO_NOTE if zero else ''}"
    domain.set_note(token, snapshot, f"{_NOTE}{end}")
    try:
        domain.write_record(token, top, group.records[top]._replace(legality=mv.ILLEGAL))
        _fill(token, domain, group.records[snapshot], top)
    except Exception:
        _take_back(token, domain, snapshot, top, zero=zero)
        raise
    domain.set_note(token, snapshot, f"{_DONE_NOTE}{end}")
    _finish(token, domain, image, snapshot, top, slot, zero=zero)
    return top


def recover_swaps(token: SpmToken, domain: Domain) -> dict[str, str]:
    """End or take back merges by renames that were cut; returns ``merged`` or ``taken back`` by child."""
    domain.refresh()
    ended = {}
    for base, note in sorted(domain.notes().items()):
        zero = note.endswith(ZERO_NOTE)
        kind, _, rest = note.removesuffix(ZERO_NOTE).partition(":")
        top, _, slot = rest.partition(":")
        if f"{kind}:" == _NOTE:
            _take_back(token, domain, base, top, zero=zero)
            ended[top] = "taken back"
        elif f"{kind}:" == _DONE_NOTE:
            _finish(token, domain, domain.record(base).image, base, top, int(slot), zero=zero)
            ended[top] = "merged"
    return ended


def _merged(base: VolumeMetadata, top: VolumeMetadata, *, block: bool) -> VolumeMetadata:
    """Return the record of the merged volume."""
    kind = SPARSE
    if base.format == RAW:
        kind = PREALLOCATED if block else base.type
    return top._replace(parent=base.parent, format=base.format, type=kind)


def _fill(token: SpmToken, domain: Domain, base: VolumeMetadata, top: str) -> None:
    record = domain.record(top)
    merged = _merged(base, record, block=domain.block)
    with open_image(domain, top, allow_illegal=True) as source:
        size = record.capacity
        if merged.format == COW:
            # Version 2 images have no zero clusters: what hides data below is data.
            zeros = domain.metadata.version < 4 and merged.parent != BLANK
            size = layers_size(source, 2, zeros=zeros) + (CHUNK if record.voltype == mv.LEAF else 0)
            size = min(size, max_size(record.capacity, COW, block=True))
        make_twin(token, domain, top, size)
        storage = open_twin(domain, top)
        try:
            if merged.format == RAW:
                if not domain.block:
                    create_raw(
                        storage, record.capacity, preallocation="falloc" if merged.type == PREALLOCATED else "off"
                    )
            else:
                parent = None if merged.parent == BLANK else domain.record(merged.parent)
                create(storage, image_options(domain, merged, parent))
            target = qcowlib.open(
                storage, "r+", format=IMAGE_FORMATS[merged.format], references=DomainReferences(domain)
            )
        except BaseException:
            storage.close()
            raise
        with target:
            if merged.parent == BLANK:
                fresh = not (merged.format == RAW and domain.block)
                copy_disk(token, source, target, target_is_zero=fresh)
            else:
                copy_layers(token, source, target, 2, below=source.layers[2].size)
            if merged.format == COW and domain.metadata.version >= 4:
                _carry(domain, record.parent, top, target)


def _carry(domain: Domain, base: str, top: str, target: qcowlib.Image) -> None:
    """Give the merged image the bitmaps of both; one of the base alone did not record what was written to top."""
    with open_image(domain, top, allow_illegal=True, backing=False) as above:
        with open_image(domain, base, allow_illegal=True, backing=False) as below:
            carry_bitmaps(below, target, good_bitmaps(above))
        carry_bitmaps(above, target)


def _take_back(token: SpmToken, domain: Domain, base: str, top: str, *, zero: bool) -> None:
    drop_twin(token, domain, top, zero=zero)
    record = domain.record(top)
    if record.legality == mv.ILLEGAL:
        domain.write_record(token, top, record._replace(legality=mv.LEGAL))
    domain.set_note(token, base, None)


def _finish(token: SpmToken, domain: Domain, image: str, base: str, top: str, slot: int, *, zero: bool) -> None:
    below = domain.record(base)
    swap_twin(token, domain, top, image, below.parent, slot)
    record = domain.record(top)
    if record.legality == mv.ILLEGAL:
        merged = _merged(below, record, block=domain.block)
        for child in children_of(domain, top):
            set_parent_name(token, domain, child, top, merged.format)
        merged = merged._replace(legality=mv.LEGAL, generation=mv.next_generation(record.generation))
        # Below version 3 the new file or volume has the permission of its role only now.
        set_role(token, domain, top, merged, record.voltype)
    drop_twin(token, domain, top, zero=zero)
    # Alone, so in one step; its note goes with it.
    remove_volumes(token, domain, image, [base], zero=zero, force=True)
