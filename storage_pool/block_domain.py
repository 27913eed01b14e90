# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Domains on a volume group: a volume is a logical volume, its record a slot.

The group is named after the domain.  Tags of the group are the domain's keys
(version 0: text in the volume ``metadata``); three tags of a logical volume
make it a volume and give its slot, parent and image.

Invariant: the tags are the truth about what exists; a volume appears by one
command that swaps its tags and disappears by one, which LVM commits
atomically.  Slots and leases are written before, and cleared after.  All
bytes go through direct I/O, for other hosts write here too.  Making and
changing the group itself is in :mod:`.block_group`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from qcowlib.errors import Busy
from qcowlib.runtime import new_condition
from qcowlib.units import MiB, ceil_div

from . import layout
from .block_leftovers import check_own_slot, find_leftovers
from .domain import Leftover, VolumeEntry
from .errors import AlreadyExists, Illegal, MetadataError, NotFound
from .ids import BLANK, check_id, is_id
from .lease_records import SafeleaseTag, lockspace_area, read_leader, resource_area, write_area
from .leases import Lease, LeaseArea
from .limits import check_metadata_room, group_warnings, text_warnings
from .lv_storage import catch_up, open_logical_volume
from .lvm import Lv, Lvm, VgState
from .metadata_domain import LATEST_VERSION, DomainMetadata, pack_v1, unpack_v1, v1_slot
from .metadata_volume import RECORD_SIZE, VolumeMetadata, parse
from .sealed import SealedStore, from_tags, to_tags
from .wiping import wipe
from .xlease import ExternalLease, XleaseVolume

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

    from .lease_records import Leader
    from .token import SpmToken

__all__ = ["BlockDomain"]


class BlockDomain:
    """A domain on a volume group; see :class:`~storage_pool.domain.Domain` for the methods without text here."""

    block: Final = True

    def __init__(self, lvm: Lvm, name: str) -> None:
        """Use :meth:`open`, or :func:`.block_group.create_block_domain`."""
        self.lvm = lvm
        self._name = name
        self._state: VgState | None = None
        self._entries: dict[str, VolumeEntry] | None = None
        self._view: DomainMetadata | None = None
        self._store = SealedStore(self._read_metadata, self._write_metadata)
        # Slots given to volumes that have no tag yet, by volume; the
        # condition is the lock under which they are chosen.
        self._pending: dict[str, int] = {}
        self._slot_lock = new_condition()

    @classmethod
    def open(cls, lvm: Lvm, name: str) -> BlockDomain:
        """Open the domain on volume group *name*.

        Raises: NotFound, MetadataError when the group is no domain.
        """
        domain = cls(lvm, check_id(name, "domain UUID"))
        if layout.TAG_DOMAIN not in domain.state.vg.tags:
            raise MetadataError("the volume group is no storage domain", path=name)
        if domain.metadata.uuid != name:
            raise MetadataError(f"the volume group is not named after its domain {domain.metadata.uuid}", path=name)
        return domain

    @staticmethod
    def discover(lvm: Lvm) -> list[str]:
        """Return the UUIDs of all domains on volume groups; one command."""
        return sorted(state.vg.name for state in lvm.groups() if layout.TAG_DOMAIN in state.vg.tags)

    def close(self) -> None:
        """Nothing is kept open."""

    def __enter__(self) -> BlockDomain:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Group and keys

    @property
    def state(self) -> VgState:
        """The group as last read."""
        if self._state is None:
            self._state = self.lvm.group(self._name)
        return self._state

    def changed(self) -> None:
        """Forget the group after it was changed."""
        self._state = None
        self._entries = None

    def _with(self, volume: str) -> VgState:
        """Return the group, read once more where it lacks *volume*: another host may have made it."""
        if check_id(volume, "volume UUID") not in self.state.lvs:
            self.changed()
        return self.state

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Whatever LVM made of a command, the group is read anew."""
        try:
            yield
        finally:
            self.changed()

    def retag(self, volumes: Sequence[str], *, add: Sequence[str], remove: Sequence[str]) -> None:
        """Change tags by one command; what is known of the group follows without another report."""
        state = self.state
        try:
            self.lvm.change_tags(self._name, list(volumes), add=add, remove=remove)
        except BaseException:
            self.changed()
            raise
        lvs = dict(state.lvs)
        for volume in volumes:
            lvs[volume] = lvs[volume]._replace(tags=(lvs[volume].tags - set(remove)) | set(add))
        self._state = state._replace(lvs=lvs)
        self._entries = None

    def refresh(self) -> None:
        self.changed()
        self._store.invalidate()
        self._view = None

    @property
    def uuid(self) -> str:
        return self._name

    @property
    def name(self) -> str:
        return self._name

    @property
    def metadata(self) -> DomainMetadata:
        if self._view is None:
            self._view = DomainMetadata(self._store.values(), self._name)
        return self._view

    def _read_metadata(self) -> dict[str, str]:
        values = from_tags(self.state.vg.tags, self._name)
        if values:
            return values
        # Version 0 keeps its text in the volume.
        with self.special("metadata") as storage:
            data = bytearray(2048)
            storage.read_into(0, [data])
        return unpack_v1(bytes(data), self._name)

    def _write_metadata(self, new: Mapping[str, str], old: Mapping[str, str]) -> None:
        if new.get("VERSION") == "0":
            data = pack_v1(new)
            with self.special("metadata", writable=True) as storage:
                storage.write(0, [data])
                storage.flush()
            return
        wanted, present = to_tags(new), {tag for tag in self.state.vg.tags if tag.startswith("MDT_")}
        self.lvm.change_group_tags(self._name, add=wanted - present, remove=present - wanted)
        self.changed()

    def change(self, token: SpmToken, changes: Mapping[str, str | None]) -> None:
        token.check()
        self._view = None
        self._store.update(changes)
        if "VERSION" in changes:
            self.refresh()

    @contextmanager
    def special(self, name: str, *, writable: bool = False) -> Iterator[Storage]:
        """Give the bytes of a logical volume, closed afterwards."""
        storage = open_logical_volume(self.lvm, self.state, name, writable=writable)
        try:
            yield storage
        finally:
            storage.close()

    def warnings(self) -> list[str]:
        """Return what is worth telling people about the group, each with its figure."""
        view = self.metadata
        found = group_warnings(self.state.vg) + (text_warnings(view.raw) if view.version == 0 else [])
        twins = [
            f"{device} says it is a device of the group too; only one of them is read" for device in self.state.twins
        ]
        return found + twins

    # Listing

    def place_slot(self, lv: Lv) -> int | None:
        """Return the slot that a logical volume has, by its tag or (V1) its place; ``None`` where it has none."""
        if self.metadata.version == 0:
            if not lv.segments:
                return None
            first = lv.segments[0]
            mapping = self.metadata.pv_mapping.values()
            pv = self.state.pvs.get(first.device)
            guid = first.device.rpartition("/")[2]
            # The device may have another name on this host; its LVM UUID stays.
            known = next((entry.guid for entry in mapping if pv is not None and entry.uuid == pv.uuid), guid)
            slot = v1_slot(mapping, known, first.first_extent)
            return slot if slot is not None and slot <= layout.MAX_SLOT else None
        return layout.slot_of(lv.tags)

    def entries(self) -> dict[str, VolumeEntry]:
        if self._entries is None:
            self._entries = self._list()
        return self._entries

    def _list(self) -> dict[str, VolumeEntry]:
        tags: dict[str, layout.VolumeTags] = {}
        found = {}
        for lv in self.state.lvs.values():
            if not is_id(lv.name):
                continue
            if layout.TAG_INITIALIZING in lv.tags:
                found[lv.name] = VolumeEntry(lv.name, (), None, initializing=True)
                continue
            besides = [tag for tag in lv.tags if not tag.startswith(layout.TAG_SLOT)]
            try:
                tags[lv.name] = layout.parse_volume_tags([*besides, f"{layout.TAG_SLOT}{self.place_slot(lv)}"])
            except MetadataError:
                # Such a volume is not ours to use; leftovers() tells of it.
                continue
        users: dict[str, set[str]] = {}
        for told in tags.values():
            if told.parent != BLANK and not told.removed:
                users.setdefault(told.parent, set()).add(told.image)
        for volume, told in tags.items():
            others = users.get(volume, set()) - {told.image}
            images = (told.image, *sorted(others))
            found[volume] = VolumeEntry(
                volume, images, told.parent, removed=told.removed, zeroing=told.zeroing, slot=told.slot
            )
        return found

    def strays(self) -> dict[str, layout.LooseTags]:
        """Return logical volumes that have a volume's name but not its three tags, with what their tags do say."""
        entries = self.entries()
        strays = [lv for lv in self.state.lvs.values() if is_id(lv.name) and lv.name not in entries]
        return {lv.name: layout.loose_volume_tags(lv.tags)._replace(slot=self.place_slot(lv)) for lv in strays}

    def occupied_slots(self) -> list[int]:
        """Return the slots that volumes have, removed ones and what a merge by renames has out of the way too."""
        return sorted(set().union(*self._slots().values()))

    def _slots(self) -> dict[str, set[int]]:
        volumes = [lv for lv in self.state.lvs.values() if lv.name not in layout.SPECIAL_VOLUMES]
        if self.metadata.version == 0:
            return {lv.name: {slot} for lv in volumes if (slot := self.place_slot(lv)) is not None}
        return {lv.name: layout.slots_of(lv.tags) for lv in volumes}

    def _own_slot(self, volume: str) -> int:
        """Return a volume's slot for writing.  Raises: NotFound, MetadataError when another has it too."""
        slot = self.slot_of(volume)
        check_own_slot(volume, slot, self._slots(), self._name)
        return slot

    def _entry(self, volume: str) -> VolumeEntry:
        self._with(volume)
        entry = self.entries().get(volume)
        if entry is None:
            raise NotFound(f"there is no volume {volume}", path=self._name)
        return entry

    def slot_of(self, volume: str) -> int:
        """Return a volume's slot.  Raises: NotFound."""
        slot = self._pending.get(volume)
        if slot is None:
            slot = self._entry(volume).slot
        if slot is None:
            raise NotFound(f"the volume {volume} has no metadata slot yet", path=self._name)
        return slot

    # Records

    def read_record(self, volume: str) -> bytes:
        slot = self.slot_of(volume)
        offset = layout.slot_offset(slot, self.metadata.version)
        data = bytearray(RECORD_SIZE)
        with self.special("metadata") as storage:
            if offset + RECORD_SIZE > storage.size:
                raise MetadataError(f"slot {slot} lies behind the end of the volume metadata", path=self._name)
            storage.read_into(offset, [data])
        return bytes(data)

    def read_records(self, *, strays: bool = False) -> dict[str, bytes]:
        """Return the records of all volumes whose slot is in the volume ``metadata``; few reads for any number.

        With *strays* those of :meth:`strays` too.
        """
        slots = [(entry.slot, volume) for volume, entry in self.entries().items() if entry.slot is not None]
        if strays:
            slots += [(told.slot, volume) for volume, told in self.strays().items() if told.slot is not None]
        found = {}
        with self.special("metadata") as storage:
            for start, size, members in layout.slot_runs(slots, self.metadata.version):
                data = bytearray(max(0, min(size, storage.size - start)))
                storage.read_into(start, [data])
                for offset, volume in members:
                    if offset + RECORD_SIZE <= len(data):
                        found[volume] = bytes(data[offset : offset + RECORD_SIZE])
        return found

    def record(self, volume: str) -> VolumeMetadata:
        return parse(self.read_record(volume), f"{self._name}/{volume}")

    def write_record(
        self, token: SpmToken, volume: str, record: VolumeMetadata, overrides: Mapping[str, str] | None = None
    ) -> None:
        data = record.to_slot(self.metadata.version, overrides)
        self.write_slot(token, self._own_slot(volume), data)

    def write_slot(self, token: SpmToken, slot: int, data: bytes, version: int | None = None) -> None:
        """Write a slot's bytes, where *version* (the domain's own by default) has it."""
        offset = layout.slot_offset(slot, self.metadata.version if version is None else version)
        with self.special("metadata", writable=True) as storage:
            token.check()
            storage.write(offset, [data])
            storage.flush()

    # Volumes

    def allocate(self, token: SpmToken, image: str, volume: str, size: int, note: str | None = None) -> None:
        check_id(image, "image UUID")
        check_id(volume, "volume UUID")
        if volume in self.state.lvs:
            raise AlreadyExists(f"the volume {volume} exists", path=self._name)
        check_metadata_room(self.state.vg)
        version = self.metadata.version
        if version:
            with self._slot_lock:
                used = {*self.occupied_slots(), *self._pending.values()}
                self._pending[volume] = layout.choose_slot(used, version)
        try:
            token.check()
            tags = [layout.TAG_INITIALIZING]
            if note is not None:
                tags.append(f"{layout.TAG_NOTE}{layout.check_note(note)}")
            self.lvm.create_volume(self._name, volume, ceil_div(max(size, 1), MiB), tags)
        except BaseException:
            self._pending.pop(volume, None)
            raise
        finally:
            self.changed()
        if not version:
            slot = self.place_slot(self.state.lv(volume))
            if slot is None:
                self.abandon(token, image, volume)
                raise MetadataError("LVM put the volume where a V1 domain has no slot for it", path=self._name)
            self._pending[volume] = slot

    def publish(self, token: SpmToken, volume: str, record: VolumeMetadata) -> None:
        view = self.metadata
        slot = self._pending.get(volume)
        if slot is None:
            raise NotFound(f"the volume {volume} was not allocated here", path=self._name)
        tags = layout.volume_tags(slot if view.version else None, record.parent, record.image)
        self.write_slot(token, slot, record.to_slot(view.version))
        if layout.has_volume_leases(view.version, view.type):
            self.make_lease(token, volume)
        token.check()
        self.retag([volume], add=tags, remove=[layout.TAG_INITIALIZING])
        self._pending.pop(volume, None)

    def make_lease(self, token: SpmToken, volume: str) -> None:
        view = self.metadata
        area = resource_area(view.uuid, volume, block_size=view.block_size, alignment=view.alignment)
        offset = layout.lease_offset(self._own_slot(volume), view.alignment)
        with self.special("leases", writable=True) as storage:
            token.check()
            write_area(storage, offset, area)

    def lease_leader(self, volume: str) -> Leader | None:
        slot, alignment = self.slot_of(volume), self.metadata.alignment
        if "leases" not in self.state.lvs:
            raise MetadataError("there is no logical volume leases", path=self._name)
        offset = layout.lease_offset(slot, alignment)
        with self.special("leases") as storage:
            if offset + alignment > storage.size:
                raise MetadataError(f"metadata slot {slot} has no lease", path=self._name)
            return read_leader(storage, offset)

    def make_lock(self, token: SpmToken, version: int) -> None:
        view = self.metadata
        geometry = {"block_size": view.block_size, "alignment": view.alignment}
        with self.special("leases", writable=True) as leases:
            token.check()
            if version < 3:
                write_area(leases, 0, SafeleaseTag(None).pack())
                return
            with self.special("ids", writable=True) as ids:
                write_area(ids, 0, lockspace_area(view.uuid, **geometry))
            write_area(leases, view.alignment, resource_area(view.uuid, "SDM", **geometry))

    def make_xleases(self, token: SpmToken, ctime: int) -> None:
        view = self.metadata
        if "xleases" not in self.state.lvs:
            token.check()
            mib = layout.special_volumes(LATEST_VERSION, view.alignment)["xleases"]
            self.lvm.create_volume(self._name, "xleases", mib, [])
            self.changed()
        with self.special("xleases", writable=True) as storage:
            token.check()
            volume = XleaseVolume(storage, path=storage.name, block_size=view.block_size, alignment=view.alignment)
            volume.format(view.uuid, ctime)

    def abandon(self, token: SpmToken, image: str, volume: str) -> None:
        check_id(image, "image UUID")
        self.changed()
        lv = self.state.lvs.get(check_id(volume, "volume UUID"))
        if lv is not None:
            if layout.TAG_INITIALIZING not in lv.tags:
                raise Illegal(f"the volume {volume} is complete", path=self._name)
            token.check()
            self.lvm.remove_volumes(self._name, [volume])
        self._pending.pop(volume, None)
        self.changed()

    def size_of(self, volume: str) -> int:
        return self._with(volume).lv(volume).size

    def usage_of(self, volume: str) -> int:
        return self.size_of(volume)

    def extend(self, token: SpmToken, volume: str, size: int) -> None:
        if self.size_of(volume) < size:
            token.check()
            with self._changing():
                self.lvm.extend_volume(self._name, volume, ceil_div(size, MiB))

    def reduce(self, token: SpmToken, volume: str, size: int, *, zero: bool = False) -> None:
        extent = self.state.vg.extent_size
        kept = ceil_div(size, extent) * extent
        if kept < self.size_of(volume):
            self.require_unused([volume])
            if zero:
                self.overwrite(token, volume, kept)
            token.check()
            with self._changing():
                self.lvm.reduce_volume(self._name, volume, ceil_div(size, MiB))

    def open_volume(self, volume: str, *, writable: bool = False) -> Storage:
        return open_logical_volume(self.lvm, self._with(volume), volume, writable=writable)

    def catch_up(self, volume: str, storage: Storage) -> None:
        """Let *storage* of :meth:`open_volume` have the size the volume has by now; others may write meanwhile.

        The volume's device follows with it for whoever else on this host has it open.
        """
        self.changed()
        catch_up(self.lvm, self.state, volume, storage)

    def require_unused(self, volumes: Sequence[str]) -> None:
        if self.lvm.activation:
            self.changed()
            if used := sorted(name for name in volumes if name in self.state.lvs and self.state.lvs[name].opened):
                raise Busy(f"the volume {used[0]} is in use on this host", path=self._name)

    def share(self, token: SpmToken, volume: str, image: str) -> None:
        """Nothing: the parent tag of the image's volume says it."""

    def set_parent_hint(self, token: SpmToken, volume: str, parent: str) -> None:
        entry = self._entry(volume)
        check_id(parent, "parent UUID", blank=True)
        if entry.parent != parent:
            token.check()
            old, new = f"{layout.TAG_PARENT}{entry.parent}", f"{layout.TAG_PARENT}{parent}"
            self.retag([volume], add=[new], remove=[old])

    def set_writable(self, token: SpmToken, volumes: Sequence[str], writable: bool) -> None:
        names = [volume for volume in volumes if self.state.lv(volume).writable != writable]
        if names:
            self._permit(token, names, writable)

    def _permit(self, token: SpmToken, names: Sequence[str], writable: bool) -> None:
        token.check()
        with self._changing():
            self.lvm.set_writable(self._name, names, writable)

    def notes(self) -> dict[str, str]:
        live = [name for name, entry in self.entries().items() if not entry.removed and not entry.initializing]
        found = {name: layout.note_of(self.state.lv(name).tags) for name in live}
        return {name: note for name, note in found.items() if note is not None}

    def set_note(self, token: SpmToken, volume: str, note: str | None) -> None:
        self.set_notes(token, [volume], note)

    def set_notes(self, token: SpmToken, volumes: Sequence[str], note: str | None) -> None:
        new = set() if note is None else {f"{layout.TAG_NOTE}{layout.check_note(note)}"}
        old = set()
        changing = []
        for volume in volumes:
            tags = {
                tag for tag in self.state.lv(check_id(volume, "volume UUID")).tags if tag.startswith(layout.TAG_NOTE)
            }
            if tags != new:
                old |= tags
                changing.append(volume)
        if changing:
            token.check()
            self.retag(changing, add=sorted(new), remove=sorted(old - new))

    def lease(self, volume: str) -> Lease | None:
        view = self.metadata
        if not layout.has_volume_leases(view.version, view.type):
            return None
        area = LeaseArea(f"/dev/{self._name}/leases", layout.lease_offset(self.slot_of(volume), view.alignment))
        return Lease(view.uuid, volume, area)

    # Removal

    def mark_removed(self, token: SpmToken, image: str, volumes: Sequence[str], *, zero: bool = False) -> None:
        check_id(image, "image UUID")
        for volume in volumes:
            if self._entry(volume).images[:1] != (image,):
                raise NotFound(f"there is no volume {volume} in image {image}", path=self._name)
        mark = layout.TAG_ZERO if zero else layout.REMOVED_PREFIX
        token.check()
        old = [f"{layout.TAG_IMAGE}{prefix}{image}" for prefix in ("", layout.REMOVED_PREFIX)]
        new = f"{layout.TAG_IMAGE}{mark}{image}"
        self.retag(volumes, add=[new], remove=[tag for tag in old if tag != new])

    def purge(self, token: SpmToken, image: str, *, wiped: Collection[str] = ()) -> None:
        check_id(image, "image UUID")
        self.changed()
        gone = [entry for entry in self.entries().values() if entry.removed and entry.images[0] == image]
        self._remove(token, gone, wiped)

    def _remove(self, token: SpmToken, gone: Sequence[VolumeEntry], wiped: Collection[str] = ()) -> None:
        if not gone:
            return
        for entry in gone:
            if entry.zeroing and entry.volume not in wiped:
                self.overwrite(token, entry.volume)
        token.check()
        with self._changing():
            self.lvm.remove_volumes(self._name, [entry.volume for entry in gone])
        # Readers take zeros for an empty record.  No volume has got the slot yet.
        used = self.occupied_slots()
        for entry in gone:
            if entry.slot is not None and entry.slot not in used:
                self.write_slot(token, entry.slot, bytes(RECORD_SIZE))

    def leftovers(self) -> list[Leftover]:
        return find_leftovers(self.entries(), self.state.lvs, self.notes().values(), self._pending)

    def sweep(self, token: SpmToken, leftovers: Sequence[Leftover]) -> None:
        names = {leftover.name for leftover in leftovers if leftover.kind != "unknown volume"}
        self.changed()
        entries = [entry for volume, entry in self.entries().items() if volume in names]
        self._remove(token, [entry for entry in entries if entry.removed or entry.initializing])
        twins = [name for name in names if layout.twin_of(name) is not None and name in self.state.lvs]
        if twins:
            token.check()
            self.lvm.remove_volumes(self._name, twins)
            self.changed()

    def overwrite(self, token: SpmToken, name: str, start: int = 0) -> None:
        """Write zeros over a logical volume, or its part from *start* on, whose extents are about to be free."""
        locked = not self.state.lv(name).writable
        if locked:
            self._permit(token, [name], True)
        with self.special(name, writable=True) as storage:
            wipe(token, storage, start, allocate=True)
        if locked and start:
            self._permit(token, [name], False)

    def capacity(self) -> tuple[int, int]:
        return self.state.vg.size, self.state.vg.free

    def external_leases(self) -> dict[str, ExternalLease] | None:
        """Return external leases by name, ``None`` where the domain has none."""
        view = self.metadata
        if not layout.has_xleases(view.version, view.type):
            return None
        with self.special("xleases") as storage:
            volume = XleaseVolume(storage, path=storage.name, block_size=view.block_size, alignment=view.alignment)
            return volume.load().leases(view.alignment)
