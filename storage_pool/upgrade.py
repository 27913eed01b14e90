# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Converting data domains in place: V1 -> V2 -> V3 -> V4 -> V5.

==== ============ ====================================================
0-2  block only   text to tags; the slot of each volume becomes a tag
0-3  file, 2-3    lock and leases of sanlock; volumes writable; sizes true
3-4               external leases
4-5               records in the new form, block: in the new area
==== ============ ====================================================

Invariant: the domain is of the old version until one write of its keys and of
the new one after it; what comes before that write is ignored by readers of
the old version, what comes after is clearing up.  So every step may be cut
and run again; :func:`upgrade` on a domain of the target version clears up.
A volume whose record is damaged stays as it is and is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qcowlib.errors import Error
from qcowlib.units import MiB

from . import layout
from .block_domain import BlockDomain
from .domain import VolumeEntry
from .errors import Illegal, MetadataError, UnsupportedVersion
from .file_domain import FileDomain
from .metadata_domain import DATA, VERSIONS
from .metadata_volume import RECORD_SIZE, SHARED, VolumeMetadata
from .sealed import to_tags
from .volume import open_image

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["upgrade"]

AnyDomain = FileDomain | BlockDomain
Report = list[str]


def upgrade(token: SpmToken, domain: AnyDomain, version: int, *, ctime: int) -> Report:
    """Bring a data domain to *version*; returns what could not be converted, in words.

    Nobody may use the domain meanwhile.  *ctime* is now, in seconds since 1970.

    Raises: UnsupportedVersion for a lower version and for domains of other
    classes, Illegal while volumes are being made or removed.
    """
    view = domain.metadata
    if version not in VERSIONS or (version == 2 and not domain.block):
        raise UnsupportedVersion(f"a domain of this kind has no version {version}", path=domain.name)
    if version < view.version:
        raise UnsupportedVersion(f"the domain has version {view.version}; there is no way back", path=domain.name)
    if view.domain_class != DATA and version != view.version:
        raise UnsupportedVersion(f"{view.domain_class} domains stay at V1", path=domain.name)
    if any(entry.initializing for entry in domain.entries().values()):
        raise Illegal("a volume is being made, or was left so", path=domain.name, hint="Sweep the leftovers first.")
    report: Report = []
    while domain.metadata.version < version:
        _step(domain.metadata.version, version, domain)(token, domain, report, ctime)
    _clear_up(token, domain)
    return report


Step = Callable[["SpmToken", AnyDomain, Report, int], None]


def _step(now: int, wanted: int, domain: AnyDomain) -> Step:
    if now == 0 and domain.block:
        return _to_v2
    if now < 3:
        return _to_v3
    return _to_v4 if now == 3 else _to_v5


def _live(domain: AnyDomain) -> dict[str, VolumeEntry]:
    return {
        volume: entry
        for volume, entry in sorted(domain.entries().items())
        if not entry.removed and not entry.initializing
    }


def _record(domain: AnyDomain, volume: str, report: Report) -> VolumeMetadata | None:
    try:
        return domain.record(volume)
    except MetadataError as error:
        report.append(f"{volume} is left as it is: {error.message}")
        return None


def _to_v2(token: SpmToken, domain: AnyDomain, report: Report, ctime: int) -> None:
    """Give each volume the tag of its slot, then write the keys as tags: the commit."""
    if not isinstance(domain, BlockDomain):
        raise UnsupportedVersion("only block domains have version 2", path=domain.name)
    for volume, entry in domain.entries().items():
        tag = f"{layout.TAG_SLOT}{entry.slot}"
        if tag not in domain.state.lv(volume).tags:
            token.check()
            domain.retag([volume], add=[tag], remove=[])
    values = {**domain.metadata.raw, "VERSION": "2", "LOGBLKSIZE": "512", "PHYBLKSIZE": "512"}
    token.check()
    domain.lvm.change_group_tags(domain.uuid, add=to_tags(values))
    domain.refresh()


def _to_v3(token: SpmToken, domain: AnyDomain, report: Report, ctime: int) -> None:
    domain.make_lock(token, 3)
    live = _live(domain)
    if isinstance(domain, BlockDomain):
        _move_high_slots(token, domain, live)
    domain.set_writable(token, list(live), True)
    with_leases = layout.has_volume_leases(3, domain.metadata.type)
    for volume in live:
        if with_leases:
            domain.make_lease(token, volume)
        record = _record(domain, volume, report)
        if record is not None:
            _true_size(token, domain, volume, record, report)
    domain.change(token, {"VERSION": "3"})


def _move_high_slots(token: SpmToken, domain: BlockDomain, live: dict[str, VolumeEntry]) -> None:
    """Give volumes beyond the last slot with a lease a lower one: text first, then the tag."""
    for volume, entry in live.items():
        if entry.slot is not None and entry.slot > layout.LAST_SLOT:
            slot = layout.choose_slot(domain.occupied_slots(), 2)
            domain.write_slot(token, slot, domain.read_record(volume))
            token.check()
            domain.retag([volume], add=[f"{layout.TAG_SLOT}{slot}"], remove=[f"{layout.TAG_SLOT}{entry.slot}"])


def _true_size(token: SpmToken, domain: AnyDomain, volume: str, record: VolumeMetadata, report: Report) -> None:
    """Correct the size in a record to the image's."""
    try:
        with open_image(domain, volume, allow_illegal=True, backing=False) as image:
            size = image.size
    except Error as error:
        report.append(f"the size of {volume} is not known: {error.message}")
        return
    if record.capacity != size and record.voltype != SHARED:
        domain.write_record(token, volume, record._replace(capacity=size))


def _to_v4(token: SpmToken, domain: AnyDomain, report: Report, ctime: int) -> None:
    if layout.has_xleases(4, domain.metadata.type):
        domain.make_xleases(token, ctime)
    domain.change(token, {"VERSION": "4"})


def _to_v5(token: SpmToken, domain: AnyDomain, report: Report, ctime: int) -> None:
    if isinstance(domain, BlockDomain):
        for volume, data in domain.read_records().items():
            record = _record(domain, volume, report)
            slot = domain.slot_of(volume)
            # What cannot be read is not made worse.
            domain.write_slot(token, slot, data if record is None else _slot_v5(volume, record, data, report), 5)
    else:
        for volume in _live(domain):
            record = _record(domain, volume, report)
            if record is not None:
                _write_both(token, domain, volume, record)
    changes = {"VERSION": "5", "BLOCK_SIZE": "512", "ALIGNMENT": str(MiB), "LOGBLKSIZE": None, "PHYBLKSIZE": None}
    domain.change(token, changes)


def _slot_v5(volume: str, record: VolumeMetadata, data: bytes, report: Report) -> bytes:
    try:
        return record.to_slot(5)
    except Error as error:
        # The old form is read by new hosts as well.
        report.append(f"{volume} keeps its old record: {error.message}")
        return data


def _write_both(token: SpmToken, domain: FileDomain, volume: str, record: VolumeMetadata) -> None:
    """Write a record that both versions read, unless it has no room for both sizes."""
    overrides = {"CAP": str(record.capacity), "SEQ": str(record.sequence)}
    try:
        record.to_bytes(4, overrides)
    except MetadataError:
        return
    domain.write_record(token, volume, record, overrides)


def _clear_up(token: SpmToken, domain: AnyDomain) -> None:
    """Remove what only older versions read."""
    version = domain.metadata.version
    if isinstance(domain, BlockDomain):
        if version >= 5:
            _zero_if_used(token, domain, 0, layout.SLOTS_BASE_V5)
        elif version >= 2:
            _zero_if_used(token, domain, 0, layout.FIRST_SLOT_OLD * RECORD_SIZE)
    elif version >= 5:
        for volume in _live(domain):
            data = domain.read_record(volume)
            if b"SIZE=" in data or b"MTIME=" in data:
                try:
                    domain.write_record(token, volume, domain.record(volume))
                except MetadataError:
                    # Damaged, or without room for the new form: both are read.
                    continue


def _zero_if_used(token: SpmToken, domain: BlockDomain, offset: int, length: int) -> None:
    data = bytearray(length)
    with domain.special("metadata", writable=True) as storage:
        storage.read_into(offset, [data])
        if any(data):
            token.check()
            storage.write(offset, [bytes(length)])
            storage.flush()
