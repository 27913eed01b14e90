# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One volume: what may be made, making it, opening it, changing its record, removing it.

Invariant: a volume is formatted before it is published; its parent becomes
INTERNAL before the child exists and LEAF again after the last child is gone,
so a cut leaves at most an INTERNAL volume without child, which
:func:`recheck_role` mends.  A volume whose data are being changed by a job is
ILLEGAL meanwhile, and its generation tells whether the job ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import qcowlib
from qcowlib.chain import probe_format
from qcowlib.errors import Error, printable
from qcowlib.qcow2.create import CreateOptions, create, create_raw
from qcowlib.units import round_up

from . import metadata_volume as mv
from .domain import Domain
from .errors import Illegal, IllegalSpec, IllegalSpecKind, MetadataError, NotFound
from .ids import BLANK, check_id
from .metadata_volume import COW, PREALLOCATED, RAW, SHARED, SPARSE, VolumeMetadata
from .opening import IMAGE_FORMATS, DomainReferences, backing_of, open_image, set_parent_name, volume_of_name
from .sizes import PAGE, capacity_for, file_initial_size, lv_size, new_lv_size
from .wiping import give_back, wipe

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = [
    "IMAGE_FORMATS",
    "ZERO_NOTE",
    "DomainReferences",
    "VolumeSpec",
    "check_spec",
    "children_of",
    "create_volume",
    "extend_capacity",
    "open_image",
    "operation",
    "recheck_role",
    "recover_removals",
    "remove_volumes",
    "set_parent_name",
    "sync_capacity",
    "update_volume",
    "volume_of_name",
]

_FIRST_BYTES: Final = 512
#: The note of volumes that are about to be removed together.
REMOVE_NOTE: Final = "remove"
#: The end of the note of an operation that overwrites what it removes.
ZERO_NOTE: Final = ":zero"


class VolumeSpec(NamedTuple):
    """A volume to be made; sizes in bytes.

    *initial_size* is what is allocated at first on block storage.  With
    *sequence* ``None`` it follows the parent's.
    """

    image: str
    volume: str
    capacity: int
    format: str = COW
    type: str = SPARSE
    parent: str = BLANK
    disktype: str = "DATA"
    description: str = ""
    initial_size: int | None = None
    legality: str = mv.LEGAL
    sequence: int | None = None
    copy_bitmaps: bool = False
    new_bitmap: str | None = None


def check_spec(spec: VolumeSpec, *, block: bool, version: int) -> None:
    """Refuse a combination of format, type, use and bitmaps that may not be.

    The first broken rule counts, in the order format, format with a parent,
    disk type, type, bitmaps, raw sparse on block storage.

    Raises: IllegalSpec, whose ``kind`` names the rule.
    """
    has_parent = spec.parent != BLANK
    kinds = IllegalSpecKind
    if spec.format not in mv.FORMATS:
        raise IllegalSpec(f"there is no volume format '{printable(spec.format[:40])}'", kind=kinds.FORMAT)
    if spec.format == RAW and has_parent:
        raise IllegalSpec("a volume with a parent is COW", kind=kinds.FORMAT)
    if spec.disktype not in mv.DISK_TYPES:
        raise IllegalSpec(f"there is no disk type '{printable(spec.disktype[:40])}'", kind=kinds.DISK_TYPE)
    if spec.type not in mv.TYPES:
        raise IllegalSpec(f"there is no volume type '{printable(spec.type[:40])}'", kind=kinds.TYPE)
    if spec.copy_bitmaps or spec.new_bitmap:
        if version < 4:
            raise IllegalSpec("bitmaps need domain version 4", kind=kinds.BITMAPS)
        if spec.format != COW or (spec.copy_bitmaps and not has_parent):
            raise IllegalSpec("bitmaps are of COW volumes, and copied from a parent", kind=kinds.BITMAPS)
    if block and spec.format == RAW and spec.type == SPARSE:
        raise IllegalSpec("on block storage a RAW volume is preallocated", kind=kinds.FORMAT)


def _parent_record(domain: Domain, spec: VolumeSpec) -> VolumeMetadata | None:
    if spec.parent == BLANK:
        return None
    parent = domain.record(check_id(spec.parent, "parent UUID"))
    # A FAKE template stands in an export domain for the one that was not exported.
    if parent.legality == mv.ILLEGAL:
        raise Illegal(f"the parent {spec.parent} is {parent.legality}", path=domain.name)
    if parent.image != spec.image and parent.voltype != SHARED:
        raise Illegal(f"the parent {spec.parent} belongs to another image and is no template", path=domain.name)
    if capacity_for(spec.capacity) < parent.capacity:
        raise IllegalSpec(
            f"a volume of {spec.capacity} bytes on a parent of {parent.capacity}", kind=IllegalSpecKind.SIZE
        )
    return parent


def create_volume(
    token: SpmToken, domain: Domain, spec: VolumeSpec, ctime: int, *, note: str | None = None
) -> VolumeMetadata:
    """Make a volume and return its record; *ctime* is now, in seconds since 1970.

    It carries *note* from the start.  Nothing is left of it when an error ends it.

    Raises: IllegalSpec, Illegal, NotFound, AlreadyExists, MetadataError,
    NoSpace, LvmError, StorageError.
    """
    check_spec(spec, block=domain.block, version=domain.metadata.version)
    check_id(spec.image, "image UUID")
    check_id(spec.volume, "volume UUID")
    parent = _parent_record(domain, spec)
    capacity = capacity_for(spec.capacity)
    initial = round_up(spec.initial_size, PAGE) if spec.initial_size else None
    if domain.block:
        size = new_lv_size(capacity, spec.format, spec.type, initial)
    else:
        file_initial_size(capacity, spec.format, spec.type, initial)
        size = 0
    record = VolumeMetadata(
        domain=domain.uuid,
        image=spec.image,
        parent=spec.parent,
        # A RAW logical volume holds as much as it has extents for.
        capacity=lv_size(size) if domain.block and spec.format == RAW else capacity,
        format=spec.format,
        type=spec.type,
        voltype=mv.LEAF,
        disktype=spec.disktype,
        description=spec.description.strip(),
        legality=spec.legality,
        ctime=ctime,
        sequence=_sequence(spec, parent),
    )
    # What cannot be recorded is refused before anything is made.
    record.to_bytes(domain.metadata.version)
    domain.allocate(token, spec.image, spec.volume, size, note)
    try:
        format_volume(domain, record, spec.volume, parent)
        if spec.copy_bitmaps or spec.new_bitmap:
            _add_bitmaps(domain, spec, parent)
        if parent is not None:
            _adopt(token, domain, spec, parent)
        domain.publish(token, spec.volume, record)
    except BaseException:
        domain.abandon(token, spec.image, spec.volume)
        if parent is not None:
            recheck_role(token, domain, spec.parent)
        raise
    return record


def _sequence(spec: VolumeSpec, parent: VolumeMetadata | None) -> int:
    if spec.sequence is not None:
        return spec.sequence
    return parent.sequence + 1 if parent is not None and parent.image == spec.image else 0


def _adopt(token: SpmToken, domain: Domain, spec: VolumeSpec, parent: VolumeMetadata) -> None:
    """Prepare the parent for the child that is about to appear."""
    if parent.image != spec.image:
        domain.share(token, spec.parent, spec.image)
    elif parent.voltype == mv.LEAF:
        set_role(token, domain, spec.parent, parent, mv.INTERNAL)


def set_role(token: SpmToken, domain: Domain, volume: str, record: VolumeMetadata, role: str) -> None:
    """Write a volume's role, and below version 3 the permission that goes with it."""
    domain.write_record(token, volume, record._replace(voltype=role))
    if domain.metadata.version < 3:
        domain.set_writable(token, [volume], role == mv.LEAF)


def format_volume(domain: Domain, record: VolumeMetadata, volume: str, parent: VolumeMetadata | None) -> None:
    """Write the empty image that *record* describes into an allocated volume."""
    storage = domain.open_volume(volume, writable=True)
    try:
        if record.format == RAW:
            if domain.block:
                storage.write(0, [bytes(_FIRST_BYTES)])
                storage.flush()
            else:
                create_raw(storage, record.capacity, preallocation="falloc" if record.type == PREALLOCATED else "off")
            return
        create(storage, image_options(domain, record, parent))
        if record.type == PREALLOCATED and not domain.block:
            end = round_up(storage.size, PAGE)
            if end < record.capacity:
                storage.zero(end, record.capacity - end, allocate=True)
                storage.flush()
    finally:
        storage.close()


def _add_bitmaps(domain: Domain, spec: VolumeSpec, parent: VolumeMetadata | None) -> None:
    """Give a new image the bitmap asked for, and empty ones like the good ones of its parent."""
    names: dict[str, int | None] = {spec.new_bitmap: None} if spec.new_bitmap else {}
    if spec.copy_bitmaps:
        if parent is None or parent.format != COW or parent.image != spec.image:
            raise IllegalSpec("bitmaps are copied from a COW parent of the same image", kind=IllegalSpecKind.BITMAPS)
        with open_image(domain, spec.parent, backing=False) as image:
            # What is disabled or was not saved cannot go on recording.
            good = {one.name: one.granularity for one in image.bitmaps() if one.enabled and not one.inconsistent}
        names = {**good, **names}
    with (
        closing(domain.open_volume(spec.volume, writable=True)) as storage,
        qcowlib.open(storage, "r+", format="qcow2", backing=False) as image,
    ):
        for name, granularity in names.items():
            image.add_bitmap(name, granularity)


def image_options(domain: Domain, record: VolumeMetadata, parent: VolumeMetadata | None) -> CreateOptions:
    """Return how the image of a COW volume is made: version 3 of the format from domain version 4 on."""
    backing = None if parent is None else record.parent.encode()
    backing_format = None if parent is None else IMAGE_FORMATS[parent.format].encode()
    version = 2 if domain.metadata.version < 4 else 3
    return CreateOptions(size=record.capacity, version=version, backing_file=backing, backing_format=backing_format)


# Records


def records_of(domain: Domain, image: str | None = None) -> dict[str, VolumeMetadata]:
    """Return the good records of all live volumes, or of those that *image* uses."""
    found = {}
    for volume, entry in domain.entries().items():
        if entry.removed or entry.initializing or (image is not None and image not in entry.images):
            continue
        try:
            found[volume] = domain.record(volume)
        except (MetadataError, NotFound):
            continue
    return found


def children_of(domain: Domain, volume: str) -> list[str]:
    """Return the live volumes whose record or tag names *volume* as parent."""
    entry = domain.entries().get(check_id(volume, "volume UUID"))
    if entry is None:
        raise NotFound(f"there is no volume {volume}", path=domain.name)
    found = set()
    for other, told in domain.entries().items():
        if told.removed or told.initializing or other == volume:
            continue
        if told.parent == volume:
            # A tag may be older than the record, which then decides.
            try:
                if domain.record(other).parent == volume:
                    found.add(other)
            except (MetadataError, NotFound):
                found.add(other)
        elif set(told.images) & set(entry.images):
            try:
                if domain.record(other).parent == volume:
                    found.add(other)
            except (MetadataError, NotFound):
                if told.parent is None and _may_stand_on(domain, other, volume):
                    found.add(other)
    return sorted(found)


def _may_stand_on(domain: Domain, volume: str, parent: str) -> bool:
    """Whether the image of a volume whose record is no help names *parent*; what cannot be read might."""
    try:
        with closing(domain.open_volume(volume)) as storage:
            if probe_format(storage) != "qcow2":
                return False
            name, _ = backing_of(storage)
    except Error:
        return True
    return name is not None and volume_of_name(name) == parent


def recheck_role(token: SpmToken, domain: Domain, volume: str) -> None:
    """Make an INTERNAL volume without children a LEAF again; written only on change."""
    record = domain.record(volume)
    if record.voltype == mv.INTERNAL and not children_of(domain, volume):
        set_role(token, domain, volume, record, mv.LEAF)


def update_volume(
    token: SpmToken,
    domain: Domain,
    volume: str,
    *,
    legality: str | None = None,
    description: str | None = None,
    role: str | None = None,
    generation: int | None = None,
    expected_generation: int | None = None,
) -> VolumeMetadata:
    """Change a volume's record; its generation becomes *generation* or the next one.

    Raises: Illegal for another generation than expected, for the legality it
    has already, for another role than SHARED and for making a template of
    what has a parent or is no leaf.
    """
    record = domain.record(volume)
    if expected_generation is not None and record.generation != expected_generation:
        raise Illegal(
            f"the volume {volume} is at generation {record.generation}, not {expected_generation}", path=domain.name
        )
    changes: dict[str, object] = {}
    if legality is not None:
        if legality not in (mv.LEGAL, mv.ILLEGAL):
            raise Illegal(f"legality is LEGAL or ILLEGAL, not '{printable(legality[:40])}'")
        if legality == record.legality:
            raise Illegal(f"the volume {volume} is {legality} already", path=domain.name)
        changes["legality"] = legality
    if role is not None:
        if role != SHARED or record.voltype != mv.LEAF or not record.is_base:
            raise Illegal(f"{record.voltype} volume {volume} cannot become {printable(role[:40])}", path=domain.name)
        changes["voltype"] = SHARED
    if description is not None:
        if len(description) > mv.DESCRIPTION_LIMIT:
            raise Illegal(f"the description has {len(description)} characters, the limit is {mv.DESCRIPTION_LIMIT}")
        changes["description"] = description.strip()
    changes["generation"] = mv.next_generation(record.generation) if generation is None else generation
    changed = record._replace(**changes)  # type: ignore[arg-type]
    domain.write_record(token, volume, changed)
    if role is not None and domain.metadata.version < 3:
        domain.set_writable(token, [volume], False)
    return changed


@contextmanager
def operation(
    token: SpmToken,
    domain: Domain,
    volume: str,
    *,
    generation: int | None = None,
    illegal: bool = True,
    role: str | None = None,
) -> Iterator[VolumeMetadata]:
    """Change a volume's data inside: ILLEGAL meanwhile, LEGAL and one generation on after.

    When the body fails the volume stays ILLEGAL with its old generation.
    With *illegal* false only the generation changes.  *role* is the volume's
    role from then on.

    Raises: Illegal for another generation than expected, before any change.
    """
    record = domain.record(volume)
    if generation is not None and record.generation != generation:
        raise Illegal(f"the volume {volume} is at generation {record.generation}, not {generation}", path=domain.name)
    if illegal and record.legality != mv.ILLEGAL:
        domain.write_record(token, volume, record._replace(legality=mv.ILLEGAL))
    yield record
    after = domain.record(volume)
    if role == SHARED and domain.metadata.version < 3:
        domain.set_writable(token, [volume], False)
    # One write says all, so nobody sees the one without the other.
    after = after._replace(
        legality=mv.LEGAL if illegal else after.legality,
        generation=mv.next_generation(record.generation),
        voltype=role or after.voltype,
    )
    domain.write_record(token, volume, after)


def extend_capacity(token: SpmToken, domain: Domain, volume: str, capacity: int) -> VolumeMetadata:
    """Make a leaf's disk larger; space for thin volumes comes when it is written.

    A cut leaves a record below the image's size, which :func:`sync_capacity` mends.

    Raises: Illegal for a volume that is no leaf or ILLEGAL, IllegalSpec for a smaller size.
    """
    record = domain.record(volume)
    if record.voltype != mv.LEAF or record.legality != mv.LEGAL:
        raise Illegal(f"the volume {volume} is {record.legality} {record.voltype}", path=domain.name)
    capacity = capacity_for(capacity)
    if capacity < record.capacity:
        raise IllegalSpec(f"{capacity} bytes are less than the {record.capacity} it has", kind=IllegalSpecKind.SIZE)
    if record.format == RAW or record.type == PREALLOCATED:
        domain.extend(token, volume, capacity)
    if record.format == RAW:
        capacity = domain.size_of(volume) if domain.block else capacity
        start = record.capacity
        if domain.block and start < capacity:
            # New extents hold what they held.
            zero_from(token, domain, volume, start)
    else:
        with open_image(domain, volume, writable=True) as image:
            token.check()
            image.resize(capacity)
    record = record._replace(capacity=capacity)
    domain.write_record(token, volume, record)
    return record


def sync_capacity(token: SpmToken, domain: Domain, volume: str) -> VolumeMetadata:
    """Correct a record that says less than the image holds; more, and templates, are left alone."""
    record = domain.record(volume)
    if record.voltype == SHARED:
        return record
    with open_image(domain, volume, allow_illegal=True, backing=False) as image:
        size = image.size
    if record.capacity < size:
        record = record._replace(capacity=size)
        domain.write_record(token, volume, record)
    return record


# Removal


def remove_volumes(
    token: SpmToken,
    domain: Domain,
    image: str,
    volumes: list[str],
    *,
    zero: bool = False,
    discard: bool = False,
    force: bool = False,
) -> None:
    """Remove volumes of an image; *zero* overwrites their data before they go, *discard* gives the blocks back.

    One volume disappears in one step, then its space is given back; a cut
    leaves a leftover to sweep.  Several are noted first and become ILLEGAL,
    then they disappear one after the other; :func:`recover_removals` ends it.

    Raises: Illegal for a template in use and for a volume whose child stays
    (unless *force*), Busy for one that this host has open.
    """
    going = set(volumes)
    records = {}
    for volume in volumes:
        record = _removable(domain, volume, going, force)
        if record is not None:
            records[volume] = record
    domain.require_unused(list(records))
    if len(volumes) > 1:
        _note_removal(token, domain, volumes, records, zero=zero)
    domain.mark_removed(token, image, volumes, zero=zero)
    if (zero or discard) and domain.metadata.version < 3:
        # There a volume that is no leaf has no permission to be written.
        domain.set_writable(token, volumes, True)
    if zero:
        for volume in volumes:
            zero_from(token, domain, volume, 0, allocate=True)
    if discard and domain.block:
        for volume in volumes:
            with closing(domain.open_volume(volume, writable=True)) as storage:
                give_back(token, storage)
    domain.purge(token, image, wiped=volumes)
    for parent in sorted({record.parent for record in records.values()} - going - {BLANK}):
        try:
            recheck_role(token, domain, parent)
        except (NotFound, MetadataError):
            # The parent is gone or damaged; check tells of it.
            continue


def _note_removal(
    token: SpmToken, domain: Domain, volumes: list[str], records: dict[str, VolumeMetadata], *, zero: bool
) -> None:
    """Note it of all, those that are ILLEGAL already last; then make the others ILLEGAL.

    So one that is noted and was made ILLEGAL proves that all are noted.  A
    note that is there already is of an operation that ends with this removal.
    """
    others = {volume for volume, note in domain.notes().items() if not note.startswith(REMOVE_NOTE)}
    note = REMOVE_NOTE + (ZERO_NOTE if zero else "")
    legal = [volume for volume, record in records.items() if record.legality == mv.LEGAL]
    for part in (legal, [volume for volume in volumes if volume not in legal]):
        domain.set_notes(token, [volume for volume in part if volume not in others], note)
    for volume in legal:
        domain.write_record(token, volume, records[volume]._replace(legality=mv.ILLEGAL))


def recover_removals(token: SpmToken, domain: Domain) -> list[str]:
    """End removals of several volumes that were cut, or take back what was only noted.

    Returns the volumes that were removed.
    """
    noted: dict[str, list[str]] = {}
    notes = domain.notes()
    for volume, note in sorted(notes.items()):
        if note.startswith(REMOVE_NOTE):
            noted.setdefault(domain.entries()[volume].images[0], []).append(volume)
    removed = []
    for image, volumes in noted.items():
        if any(domain.record(volume).legality == mv.ILLEGAL for volume in volumes):
            zero = notes[volumes[0]].endswith(ZERO_NOTE)
            remove_volumes(token, domain, image, volumes, zero=zero, force=True)
            removed += volumes
        else:
            domain.set_notes(token, volumes, None)
    return removed


def _removable(domain: Domain, volume: str, going: set[str], force: bool) -> VolumeMetadata | None:
    try:
        record = domain.record(volume)
    except MetadataError:
        # A volume whose record is damaged can be removed all the same.
        record = None
    if force:
        return record
    staying = set(children_of(domain, volume)) - going
    if staying:
        raise Illegal(f"the volume {volume} has children: {', '.join(sorted(staying))}", path=domain.name)
    if record is not None and record.voltype == SHARED and len(domain.entries()[volume].images) > 1:
        raise Illegal(f"the template {volume} is in use", path=domain.name)
    return record


def zero_from(token: SpmToken, domain: Domain, volume: str, start: int, *, allocate: bool = False) -> None:
    """Overwrite the bytes of a volume from *start* on."""
    with closing(domain.open_volume(volume, writable=True)) as storage:
        wipe(token, storage, start, allocate=allocate)
