# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""All that is known of a domain, as one JSON document; reads only.

Invariant: nothing on storage is changed, no lock is taken, and what cannot be
read is told (``status`` of a volume, ``problems`` in words) instead of ending
the dump.  ``problems`` is there only when there are some.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qcowlib.errors import Error

from . import layout
from .file_domain import FileDomain
from .ids import is_id
from .metadata_domain import ISO
from .metadata_volume import STATUS_INIT, STATUS_INVALID, STATUS_OK, STATUS_REMOVED, parse_lenient

if TYPE_CHECKING:
    from .domain import Domain
    from .xlease import ExternalLease

__all__ = ["Document", "dump_file"]

Document = dict[str, object]


def _record(domain: Domain, volume: str, problems: Document) -> Document:
    """Return the fields of a record that can be read, with its status; add what is wrong to *problems*."""
    try:
        values, found = parse_lenient(domain.read_record(volume))
    except Error as error:
        problems[volume] = [str(error)]
        return {"status": STATUS_INVALID}
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


def _external(leases: Mapping[str, ExternalLease] | None) -> Document:
    return {} if leases is None else {name: dict(lease._asdict()) for name, lease in sorted(leases.items())}


def dump_file(domain: FileDomain) -> Document:
    """Return the document of a domain in a directory."""
    document = _common(domain)
    if domain.metadata.domain_class == ISO:
        document["files"] = domain.iso_files()
        return document
    listing = domain.listing()
    entries = domain.entries()
    volumes: Document = {}
    problems: Document = {}
    for volume, entry in entries.items():
        if entry.initializing:
            volumes[volume] = {"image": entry.images[0], "status": STATUS_INIT}
            continue
        found = _record(domain, volume, problems)
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
        external = domain.external_leases()
        if external is not None:
            document["external_leases"] = _external(external)
    except Error as error:
        problems["external_leases"] = [str(error)]
    if problems:
        document["problems"] = problems
    return document


def _volume_leases(domain: FileDomain, listing: Mapping[str, list[str]], problems: Document) -> Document:
    found: Document = {}
    for volume, images in sorted(listing.items()):
        if not is_id(images[0]):
            continue
        try:
            resource = domain.lease_name(volume)
        except Error as error:
            problems.setdefault(volume, [f"lease: {error}"])
            continue
        if resource is not None:
            path = f"images/{images[0]}/{volume}{layout.LEASE_SUFFIX}"
            found[volume] = {"offset": 0, "path": path, "resource": resource}
    return found
