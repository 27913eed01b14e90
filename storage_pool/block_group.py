# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Making, growing, shrinking and removing the volume group of a block domain.

Order at creation: group with the tag UNREADY, special volumes, their content,
the master's file system; then one command that puts all keys and the domain's
tag in place of UNREADY, which is the commit.

Invariant: before the commit no host takes the group for a domain, after it
everything is there; a device is in the mapping before a volume may use it
only in version 0, whose slots come from the mapping.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from qcowlib.errors import StorageError
from qcowlib.units import GiB

from . import layout
from .block_domain import BlockDomain
from .errors import Illegal, InvalidName, LvmError, NotFound, UnsupportedVersion
from .lease_records import SafeleaseTag, lockspace_area, resource_area, write_area
from .lv_storage import open_logical_volume, volume_device
from .lvm import Lvm, Pv, VgState
from .metadata_domain import BLOCK_TYPES, DomainMetadata, PvEntry, mapping_for, new_domain_values, pack_v1
from .sealed import to_tags
from .xlease import XleaseVolume

if TYPE_CHECKING:
    from .process import ProcessRunner
    from .token import SpmToken

__all__ = [
    "create_block_domain",
    "destroy_block_domain",
    "extend_block_domain",
    "reduce_block_domain",
    "repair_mapping",
    "resize_device",
]

MINIMUM_SIZE: Final = 10 * GiB


def _check_devices(devices: Sequence[str]) -> None:
    if not devices:
        raise InvalidName("a block domain needs a device")
    if len(set(devices)) != len(devices):
        raise InvalidName("the same device twice")
    for device in devices:
        try:
            mode = os.stat(device).st_mode  # noqa: PTH116
        except OSError as error:
            raise StorageError.from_os(error, path=device, operation="open") from error
        if not stat.S_ISBLK(mode):
            raise InvalidName("not a block device", path=device)
        name = os.path.basename(os.path.realpath(device))
        try:
            with open(f"/sys/class/block/{name}/queue/logical_block_size") as file:
                block_size = int(file.read())
        except (OSError, ValueError):
            # A partition has no queue of its own; LVM refuses mixed sizes.
            continue
        if block_size != 512:
            raise UnsupportedVersion(
                f"block domains need devices with blocks of 512 bytes, not {block_size}", path=device
            )


def _entries(state: VgState, present: dict[int, PvEntry] | None = None) -> dict[int, PvEntry]:
    """Return the mapping with every device of the group: the metadata's first, others by name."""
    known = {entry.uuid for entry in (present or {}).values()}
    first = _metadata_device(state)
    pvs = sorted(state.pvs.values(), key=lambda pv: (pv.name != first, pv.name))
    added = [(pv.guid, pv.uuid, pv.pe_count) for pv in pvs if pv.uuid not in known]
    return mapping_for(present or {}, added)


def _metadata_device(state: VgState) -> str:
    """Return the device on which the volume ``metadata`` begins.  Raises: NotFound."""
    return next((segment.device for segment in state.lv("metadata").segments), "")


def _mapping_values(entries: dict[int, PvEntry]) -> dict[str, str]:
    return {f"PV{number}": entry.encode() for number, entry in entries.items()}


def create_block_domain(
    token: SpmToken,
    lvm: Lvm,
    runner: ProcessRunner,
    uuid: str,
    devices: Sequence[str],
    *,
    version: int,
    storage_type: str = "ISCSI",
    description: str = "",
    ctime: int,
    force: bool = False,
) -> BlockDomain:
    """Make a data domain of *devices*; the first one keeps the metadata.

    *force* takes devices that hold something.  *ctime* is now, in seconds
    since 1970.

    Raises: InvalidName, UnsupportedVersion, LvmError, Illegal when the devices
    have less than 10 GiB.
    """
    if storage_type not in BLOCK_TYPES:
        raise UnsupportedVersion(f"{storage_type} domains are directories")
    values = new_domain_values(uuid, version=version, storage_type=storage_type, description=description)
    _check_devices(devices)
    token.check()
    lvm.create_group(uuid, devices, [layout.TAG_UNREADY], force=force)
    try:
        _fill(token, lvm, runner, values, ctime)
    except BaseException:
        # Nothing but ours is in the group, which is no domain yet.
        lvm.remove_group(uuid)
        raise
    return BlockDomain.open(lvm, uuid)


def _fill(token: SpmToken, lvm: Lvm, runner: ProcessRunner, values: dict[str, str], ctime: int) -> None:
    view = DomainMetadata(values)
    state = lvm.group(view.uuid)
    if state.vg.tags != {layout.TAG_UNREADY} or state.lvs:
        raise Illegal("the volume group is not a fresh one", path=view.uuid)
    if state.vg.size < MINIMUM_SIZE:
        raise Illegal(f"a block domain needs {MINIMUM_SIZE >> 30} GiB, the devices have {state.vg.size >> 20} MiB")
    metadata_pv = state.metadata_pv
    if metadata_pv is None:
        raise LvmError("no physical volume keeps the group's metadata", path=view.uuid)
    for name, mib in layout.special_volumes(view.version, view.alignment).items():
        token.check()
        lvm.create_volume(view.uuid, name, mib, [], metadata_pv.name if name == "metadata" else None)
    state = lvm.group(view.uuid)
    first = state.lvs["metadata"].segments[0]
    if first.device != metadata_pv.name or first.first_extent != 0:
        raise LvmError("the volume metadata does not begin at the first extent", path=view.uuid)
    values["VGUUID"] = state.vg.uuid
    values.update(_mapping_values(_entries(state)))
    _write_areas(lvm, state, view, ctime)
    _format_master(lvm, runner, state)
    token.check()
    if view.version == 0:
        _write(lvm, state, "metadata", 0, pack_v1(values))
        tags = set()
    else:
        tags = to_tags(values)
    lvm.change_group_tags(view.uuid, add={*tags, layout.TAG_DOMAIN}, remove=[layout.TAG_UNREADY])


def _write(lvm: Lvm, state: VgState, name: str, offset: int, data: bytes) -> None:
    storage = open_logical_volume(lvm, state, name, writable=True)
    try:
        write_area(storage, offset, data)
    finally:
        storage.close()


def _write_areas(lvm: Lvm, state: VgState, view: DomainMetadata, ctime: int) -> None:
    for name, size in (
        ("metadata", layout.METADATA_ZEROED),
        ("inbox", layout.MAILBOX_ZEROED),
        ("outbox", layout.MAILBOX_ZEROED),
    ):
        storage = open_logical_volume(lvm, state, name, writable=True)
        try:
            storage.zero(0, size, allocate=True)
            storage.flush()
        finally:
            storage.close()
    if view.version < 3:
        _write(lvm, state, "leases", 0, SafeleaseTag(None).pack())
        return
    geometry = {"block_size": view.block_size, "alignment": view.alignment}
    _write(lvm, state, "ids", 0, lockspace_area(view.uuid, **geometry))
    _write(lvm, state, "leases", view.alignment, resource_area(view.uuid, "SDM", **geometry))
    if layout.has_xleases(view.version, view.type):
        storage = open_logical_volume(lvm, state, "xleases", writable=True)
        try:
            XleaseVolume(storage, path=storage.name, **geometry).format(view.uuid, ctime)
        finally:
            storage.close()


def _format_master(lvm: Lvm, runner: ProcessRunner, state: VgState) -> None:
    """Make the journalled file system on which a master domain keeps its tasks."""
    with volume_device(lvm, runner, state, "master") as device:
        done = runner.run(["mke2fs", "-q", "-F", "-j", "-E", "nodiscard", device], timeout_s=300.0)
        if done.returncode:
            raise LvmError(f"mke2fs: {done.message()}", path=state.vg.name, returncode=done.returncode)


def extend_block_domain(token: SpmToken, domain: BlockDomain, devices: Sequence[str], *, force: bool = False) -> None:
    """Add devices.  A cut after LVM's part is mended by :func:`repair_mapping`."""
    _check_devices(devices)
    present = {pv.name for pv in domain.state.pvs.values()}
    if twice := present & set(devices):
        raise InvalidName("the device belongs to the domain already", path=min(twice))
    _check_mapping_room(domain, devices)
    token.check()
    domain.lvm.extend_group(domain.uuid, devices, force=force)
    domain.changed()
    repair_mapping(token, domain)


def _check_mapping_room(domain: BlockDomain, devices: Sequence[str]) -> None:
    """Refuse devices that the 2048 bytes of a version 0 domain cannot name, before LVM has them."""
    if domain.metadata.version:
        return
    # A UUID of LVM has 38 characters; six digits of extents are 128 TiB.
    added = [(os.path.basename(device), "x" * 38, 999_999) for device in devices]
    entries = mapping_for(domain.metadata.pv_mapping, added)
    pack_v1({**domain.metadata.raw, **_mapping_values(entries)})


def repair_mapping(token: SpmToken, domain: BlockDomain) -> bool:
    """Put devices that the mapping lacks into it; returns whether any were."""
    mapping = domain.metadata.pv_mapping
    entries = _entries(domain.state, mapping)
    if entries == mapping:
        return False
    domain.change(token, _mapping_values(entries))
    return True


def reduce_block_domain(token: SpmToken, domain: BlockDomain, device: str) -> None:
    """Take an empty device out; the mapping is numbered without gaps, which other hosts need.

    Raises: NotFound, Illegal for the device of the metadata and one in use.
    """
    state = domain.state
    pv: Pv | None = state.pvs.get(device)
    if pv is None:
        raise NotFound("the device does not belong to the domain", path=device)
    if pv.mda_used_count or _metadata_device(state) == device:
        raise Illegal("the device keeps the domain's metadata", path=device)
    if pv.pe_alloc_count:
        raise Illegal(f"{pv.pe_alloc_count} extents of the device are in use", path=device, hint="Move them first.")
    token.check()
    domain.lvm.reduce_group(domain.uuid, device)
    domain.changed()
    mapping = domain.metadata.pv_mapping
    kept = [entry for entry in mapping.values() if entry.uuid != pv.uuid]
    changes: dict[str, str | None] = dict.fromkeys(f"PV{number}" for number in mapping)
    changes.update(_mapping_values(dict(enumerate(kept))))
    domain.change(token, changes)


def resize_device(token: SpmToken, domain: BlockDomain, device: str) -> None:
    """Let the domain see that a device has grown.  Its entry in the mapping stays."""
    if device not in domain.state.pvs:
        raise NotFound("the device does not belong to the domain", path=device)
    token.check()
    domain.lvm.resize_pv(device)
    domain.changed()


def destroy_block_domain(token: SpmToken, domain: BlockDomain) -> None:
    """Remove the domain with everything in it; it stops being a domain first.

    Raises: Illegal while it is attached to a pool.
    """
    if domain.metadata.pools:
        raise Illegal("the domain is attached to a pool", path=domain.name, hint="Detach it first.")
    token.check()
    domain.lvm.change_group_tags(domain.uuid, add=[layout.TAG_UNREADY], remove=[layout.TAG_DOMAIN])
    domain.lvm.remove_group(domain.uuid)
    domain.changed()
