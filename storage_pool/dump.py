# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""All that is known of a domain, as one JSON document; reads only.

Invariant: nothing on storage is changed, no lock is taken, and what cannot be
read is told (``status`` of a volume, ``problems`` in words) instead of ending
the dump.  ``problems`` is there only when there are some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qcowlib.errors import Error

from . import layout
from .file_domain import FileDomain
from .ids import is_id
from .iso import list_media
from .lease_records import read_leader
from .metadata_domain import ISO
from .metadata_volume import STATUS_INIT, STATUS_INVALID, STATUS_OK, STATUS_REMOVED, parse_lenient

if TYPE_CHECKING:
    from .block_domain import BlockDomain
    from .domain import Domain, VolumeEntry
    from .xlease import ExternalLease

__all__ = ["Document", "dump_block", "dump_file"]

Document = dict[str, object]


def _record(data: bytes, volume: str, problems: Document) -> Document:
    """Return the fields of a record that can be read, with its status; add what is wrong to *problems*."""
    values, found = parse_lenient(data)
    if found:
        problems[volume] = list(found)
    fields: Document = {key: value for key, value in values.items() if key != "domain"}
    fields["status"] = STATUS_INVALID if found else STATUS_OK
    return fields


def _common(domain: Domain) -> Document:
    view = domain.metadata
    return {
        "alignment": view.alignment,
        "block_size": view.block_size,
        "domain_metadata_raw": dict(view.raw),
        "info": view.info(),
        "sd_uuid": view.uuid,
        "version": view.version,
    }


def _external(leases: Mapping[str, ExternalLease] | None) -> Document | None:
    return None if leases is None else {name: dict(lease._asdict()) for name, lease in sorted(leases.items())}


def dump_file(domain: FileDomain) -> Document:
    """Return the document of a domain in a directory."""
    document = _common(domain)
    if domain.metadata.domain_class == ISO:
        document["files"] = list_media(domain)
        return document
    listing = domain.listing()
    entries = domain.entries()
    volumes: Document = {}
    problems: Document = {}
    for volume, entry in entries.items():
        if entry.initializing:
            volumes[volume] = {"image": entry.images[0], "status": STATUS_INIT}
            continue
        try:
            found = _record(domain.read_record(volume), volume, problems)
        except Error as error:
            problems[volume] = [str(error)]
            found = {"status": STATUS_INVALID}
        found.setdefault("image", entry.images[0])
        if entry.removed:
            found["status"] = STATUS_REMOVED
        try:
            found["apparentsize"] = domain.size_of(volume)
        except Error as error:
            found["status"] = STATUS_INVALID
            problems.setdefault(volume, [str(error)])
        volumes[volume] = found
    document["volumes"] = volumes
    document["all_images"] = domain.image_names()
    document["all_volumes"] = {
        volume: {"images": images, "parent": entries[volume].parent} for volume, images in sorted(listing.items())
    }
    document["leases"] = _volume_leases(domain, listing, problems)
    try:
        if (external := _external(domain.external_leases())) is not None:
            document["external_leases"] = external
    except Error as error:
        problems["external_leases"] = [str(error)]
    if problems:
        document["problems"] = problems
    return document


def _volume_leases(domain: FileDomain, listing: Mapping[str, list[str]], problems: Document) -> Document:
    found: Document = {}
    if not layout.has_volume_leases(domain.metadata.version, domain.metadata.type):
        return found
    for volume, images in sorted(listing.items()):
        if not is_id(images[0]):
            continue
        try:
            leader = domain.lease_leader(volume)
        except Error as error:
            problems.setdefault(volume, [f"lease: {error}"])
            continue
        path = f"images/{images[0]}/{volume}{layout.LEASE_SUFFIX}"
        found[volume] = {"offset": 0, "path": path, "resource": leader.resource_name if leader else ""}
    return found


def dump_block(domain: BlockDomain) -> Document:
    """Return the document of a domain on a volume group."""
    view = domain.metadata
    document = _common(domain)
    problems: Document = {}
    try:
        records = domain.read_records(strays=True)
    except Error as error:
        records = {}
        problems["metadata"] = [str(error)]
    document["volumes"] = _block_volumes(domain, records, problems)
    live = {
        volume: entry
        for volume, entry in sorted(domain.entries().items())
        if not entry.removed and not entry.initializing
    }
    document["all_volumes"] = _members(domain, live)
    document["all_images"] = sorted({image for entry in live.values() for image in entry.images})
    document["slots"] = _slots(domain)
    document["occupied_slots"] = occupied = domain.occupied_slots()
    document["next_free_slot"] = next(
        slot for slot in range(layout.first_slot(view.version), len(occupied) + 8) if slot not in occupied
    )
    parts: dict[str, Callable[[], Document | None]] = {
        "pv_mapping": lambda: {f"PV{number}": entry.as_dict() for number, entry in view.pv_mapping.items()},
        "external_leases": lambda: _external(domain.external_leases()),
        "leases": lambda: _block_leases(domain, live),
    }
    for name, part in parts.items():
        try:
            if (found := part()) is not None:
                document[name] = found
        except Error as error:
            problems[name] = [str(error)]
    document.update(_group(domain))
    if problems:
        document["problems"] = problems
    return document


def _block_volumes(domain: BlockDomain, records: Mapping[str, bytes], problems: Document) -> Document:
    """Return the volumes as their records tell, and as tags do where a record is silent."""
    volumes: Document = {}
    strays = domain.strays()
    for volume in sorted({*domain.entries(), *strays}):
        entry = domain.entries().get(volume)
        told = strays.get(volume) or layout.loose_volume_tags(domain.state.lv(volume).tags)
        size = domain.state.lv(volume).size
        fields: Document = {"apparentsize": size, "truesize": size}
        if entry is not None and entry.initializing:
            volumes[volume] = {**fields, "status": STATUS_INIT}
            continue
        slot = told.slot if entry is None else entry.slot
        record: Document = {"status": STATUS_INVALID}
        if slot is not None:
            record = _record(records.get(volume, b""), volume, problems)
            fields["mdslot"] = slot
        if told.image is not None:
            record.setdefault("image", told.image)
        if told.parent is not None:
            record.setdefault("parent", told.parent)
        if told.removed:
            record["status"] = STATUS_REMOVED
        if entry is None:
            record["status"] = STATUS_INVALID
            problems[volume] = ["its tags are not those of a volume"]
        volumes[volume] = {**record, **fields}
    return volumes


def _members(domain: BlockDomain, live: Mapping[str, VolumeEntry]) -> Document:
    """Return images and parent of each volume; other hosts list one whose slot tag alone is bad."""
    found: Document = {volume: {"images": list(entry.images), "parent": entry.parent} for volume, entry in live.items()}
    for volume, told in domain.strays().items():
        if told.image is not None and told.parent is not None and not told.removed:
            found[volume] = {"images": [told.image], "parent": told.parent}
            users = live[told.parent].images if told.parent in live else (told.image,)
            if told.image not in users:
                found[told.parent] = {"images": [*users, told.image], "parent": live[told.parent].parent}
    return dict(sorted(found.items()))


def _slots(domain: BlockDomain) -> Document:
    view = domain.metadata
    found: Document = {}
    for volume, entry in sorted(domain.entries().items()):
        if entry.slot is None:
            continue
        mark = layout.TAG_ZERO if entry.zeroing else layout.REMOVED_PREFIX if entry.removed else ""
        found[volume] = {
            "image": mark + entry.images[0],
            "lease_offset": layout.lease_offset(entry.slot, view.alignment),
            "metadata_offset": layout.slot_offset(entry.slot, view.version),
            "parent": entry.parent,
            "slot": entry.slot,
        }
    return found


def _block_leases(domain: BlockDomain, live: Mapping[str, VolumeEntry]) -> Document:
    """Return the resource written for each volume."""
    view = domain.metadata
    found: Document = {}
    if not layout.has_volume_leases(view.version, view.type):
        return found
    with domain.special("leases") as storage:
        for volume, entry in live.items():
            if entry.slot is None:
                continue
            offset = layout.lease_offset(entry.slot, view.alignment)
            leader = read_leader(storage, offset)
            found[volume] = {"offset": offset, "path": "leases", "resource": leader.resource_name if leader else ""}
    return found


def _group(domain: BlockDomain) -> Document:
    """Return what LVM knows of the group."""
    state = domain.state
    vg = state.vg
    info = domain.metadata.info()
    first = state.lvs["metadata"].segments[0].device if "metadata" in state.lvs else ""
    metadata_pv = state.metadata_pv
    info.update(
        metadataDevice=first.rpartition("/")[2],
        vgMetadataDevice=metadata_pv.guid if metadata_pv is not None else "",
        state="PARTIAL" if vg.partial else "OK",
        vguuid=vg.uuid,
    )
    return {
        "info": info,
        "lvs": [
            {"devices": lv.devices, "name": lv.name, "size": lv.size, "tags": sorted(lv.tags)}
            for _, lv in sorted(state.lvs.items())
        ],
        "pvs": [
            {
                "guid": pv.guid,
                "mda_count": pv.mda_count,
                "mda_used_count": pv.mda_used_count,
                "metadata_pv": pv.mda_used_count > 0,
                "pe_count": pv.pe_count,
                "pe_start": pv.pe_start,
                "uuid": pv.uuid,
            }
            for pv in state.pvs.values()
        ],
        "vg": {"extent_size": vg.extent_size, "mda_size": vg.mda_size, "tags": sorted(vg.tags)},
        "vg_uuid": vg.uuid,
        "warnings": domain.warnings(),
    }
