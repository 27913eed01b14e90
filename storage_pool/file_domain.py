# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Domains in a directory: local, NFS, POSIX and Gluster; data, export and ISO.

``<mount>/<uuid>/`` holds ``dom_md``, ``images/<image>/`` and, on a master and
on export domains, ``master``.  A volume is a file, its record ``.meta`` and,
from version 3 on but not on local storage, its lease ``.lease``.

Invariant: ``.meta`` is the last file of a volume to appear and the first to
go, ``dom_md/metadata`` the last of a domain; every name below the domain's
directory is walked without following links.  A volume used by several
images is one set of files with links in each image directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final

from qcowlib.errors import Error, GateDenied

from . import layout
from .domain import Leftover, VolumeEntry
from .errors import AlreadyExists, Illegal, IllegalSpec, IllegalSpecKind, MetadataError, NotFound, UnsupportedVersion
from .file_leftovers import find_leftovers, sweep_leftovers
from .ids import BLANK, ISO_IMAGE, check_id, is_id
from .lease_records import SafeleaseTag, lockspace_area, read_leader, resource_area, write_area
from .leases import Lease, LeaseArea
from .metadata_domain import BACKUP, BLOCK_TYPES, DATA, ISO, DomainMetadata, new_domain_values
from .metadata_volume import RECORD_SIZE, VolumeMetadata, parse, parse_lenient
from .rooted import Rooted, detect_block_size
from .sealed import SealedStore, from_lines, split_lines, to_lines
from .sizes import sanlock_alignment
from .xlease import ExternalLease, XleaseVolume

if TYPE_CHECKING:
    from qcowlib.storage.file import FileStorage

    from .lease_records import Leader
    from .token import SpmToken

__all__ = ["FileDomain", "discover"]

_METADATA: Final = "dom_md/metadata"
_META: Final = layout.META_SUFFIX
_LEASE: Final = layout.LEASE_SUFFIX
_NOTE: Final = layout.NOTE_SUFFIX
_REMOVED: Final = layout.REMOVED_PREFIX
_MODE: Final = 0o660
_READ_ONLY_MODE: Final = 0o440


def discover(mount: str) -> list[str]:
    """Return the directories of domains directly below *mount*, sorted.

    Other hosts use the first one only; a mount holds one domain.
    """
    root = Rooted(mount)
    found = []
    try:
        for name in filter(is_id, root.names()):
            try:
                if root.exists(f"{name}/{_METADATA}"):
                    found.append(root.full(name))
            except GateDenied:
                # A file or link of that name is no domain.
                continue
    finally:
        root.close()
    return found


class FileDomain:
    """A domain in a directory; see :class:`~storage_pool.domain.Domain` for the methods without text here."""

    block: Final = False

    def __init__(self, root: Rooted) -> None:
        """Open the domain at *root*; use :meth:`open` or :meth:`create`."""
        self._root = root
        self._store = SealedStore(self._read_metadata, self._write_metadata)
        self._still_allowed: Callable[[], None] = lambda: None
        self._listing: dict[str, list[str]] | None = None
        self._data_only: dict[str, str] = {}
        self._with_note: dict[str, str] = {}
        self._view: DomainMetadata | None = None

    # Life

    @classmethod
    def open(cls, path: str) -> FileDomain:
        """Open the domain in directory *path*, or the one directly below it.

        Raises: NotFound, MetadataError.
        """
        if not os.path.exists(f"{path}/{_METADATA}"):  # noqa: PTH110
            found = discover(path)
            if not found:
                raise NotFound("no storage domain here", path=path)
            path = found[0]
        domain = cls(Rooted(path.rstrip("/") or "/"))
        try:
            domain._check_name()
        except BaseException:
            domain.close()
            raise
        return domain

    def _check_name(self) -> None:
        name = os.path.basename(os.path.realpath(self._root.path))
        if self.metadata.uuid != name:
            raise MetadataError(f"the directory is not named after its domain {self.metadata.uuid}", path=self.name)
        if self.metadata.type in BLOCK_TYPES:
            raise MetadataError(f"a {self.metadata.type} domain in a directory", path=self.name)

    @classmethod
    def create(
        cls,
        token: SpmToken,
        parent: str,
        uuid: str,
        *,
        version: int,
        storage_type: str,
        domain_class: str = DATA,
        description: str = "",
        remote_path: str,
        block_size: int = 512,
        max_hosts: int = 250,
        ctime: int,
    ) -> FileDomain:
        """Make a domain in the mounted directory *parent*.

        *ctime* is now, in seconds since 1970.  What a cut leaves has no
        ``dom_md/metadata`` and is no domain.

        Raises: AlreadyExists, UnsupportedVersion, InvalidName, StorageError.
        """
        if storage_type in BLOCK_TYPES:
            raise UnsupportedVersion(f"{storage_type} domains are made of devices, not in a directory")
        alignment = sanlock_alignment(block_size, max_hosts)
        values = new_domain_values(
            uuid,
            version=version,
            storage_type=storage_type,
            domain_class=domain_class,
            description=description,
            remote_path=remote_path,
            block_size=block_size,
            alignment=alignment,
        )
        if detect_block_size(parent) == 4096 and block_size == 512:
            raise UnsupportedVersion("the storage has blocks of 4096 bytes, the domain shall have 512", path=parent)
        above = Rooted(parent)
        try:
            if discover(parent):
                raise AlreadyExists("the mount holds a domain already", path=parent)
            token.check()
            above.make_directory(uuid)
        finally:
            above.close()
        domain = cls(Rooted(f"{parent.rstrip('/')}/{uuid}"))
        domain._lay_out(values, DomainMetadata(values), ctime)
        return domain

    def _lay_out(self, values: dict[str, str], view: DomainMetadata, ctime: int) -> None:
        root, version = self._root, view.version
        root.make_directory(layout.METADATA_DIR)
        for name, size in (("ids", 0), ("inbox", layout.MAILBOX_SIZE), ("outbox", layout.MAILBOX_SIZE), ("leases", 0)):
            root.create(f"dom_md/{name}", size=size)
        if layout.has_xleases(version, view.type):
            root.create("dom_md/xleases")
            with root.open("dom_md/xleases", writable=True) as storage:
                xleases = XleaseVolume(storage, path=storage.name, block_size=view.block_size, alignment=view.alignment)
                xleases.format(view.uuid, ctime)
        root.make_directory(layout.IMAGES_DIR)
        if view.domain_class == ISO:
            root.make_directory(f"images/{ISO_IMAGE}")
        if view.domain_class == BACKUP:
            self._make_master_tree()
        self._initialise_lock(view)
        root.replace(_METADATA, self._text(values))

    def _make_xleases(self, view: DomainMetadata, ctime: int) -> None:
        if not self._root.exists("dom_md/xleases"):
            self._root.create("dom_md/xleases")
        with self._root.open("dom_md/xleases", writable=True) as storage:
            volume = XleaseVolume(storage, path=storage.name, block_size=view.block_size, alignment=view.alignment)
            volume.format(view.uuid, ctime)

    def make_xleases(self, token: SpmToken, ctime: int) -> None:
        token.check()
        self._make_xleases(self.metadata, ctime)

    def _make_master_tree(self) -> None:
        for name in (layout.MASTER_DIR, "master/tasks", "master/vms"):
            self._root.make_directory(name, exist_ok=True)

    def make_lock(self, token: SpmToken, version: int) -> None:
        token.check()
        self._initialise_lock(DomainMetadata({**self.metadata.raw, "VERSION": str(version)}))

    def _initialise_lock(self, view: DomainMetadata) -> None:
        if view.type == "LOCALFS" and view.version >= 3:
            return
        with self._root.open("dom_md/leases", writable=True) as leases:
            if view.version < 3:
                write_area(leases, 0, SafeleaseTag(None).pack())
                return
            geometry = {"block_size": view.block_size, "alignment": view.alignment}
            with self._root.open("dom_md/ids", writable=True) as ids:
                write_area(ids, 0, lockspace_area(view.uuid, **geometry))
            write_area(leases, view.alignment, resource_area(view.uuid, "SDM", **geometry))

    def destroy(self, token: SpmToken) -> None:
        """Remove the domain with everything in it; its metadata goes first.

        Raises: Illegal while it is attached to a pool.
        """
        if self.metadata.pools:
            raise Illegal("the domain is attached to a pool", path=self.name, hint="Detach it first.")
        token.check()
        self._root.unlink(_METADATA)
        above = Rooted(os.path.dirname(self._root.path) or ".")
        try:
            above.remove_tree(os.path.basename(self._root.path))
        finally:
            above.close()

    def close(self) -> None:
        self._root.close()

    def __enter__(self) -> FileDomain:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Keys

    @property
    def uuid(self) -> str:
        return self.metadata.uuid

    @property
    def name(self) -> str:
        return self._root.path

    @property
    def root(self) -> Rooted:
        """The domain's directory, for files of special classes of domains (:mod:`.iso`)."""
        return self._root

    def special(self, name: str, *, writable: bool = False) -> AbstractContextManager[FileStorage]:
        """Give the bytes of a special file (``ids``, ``leases``, ``inbox``, ...), closed afterwards."""
        return self._root.open(f"dom_md/{name}", writable=writable)

    @property
    def metadata(self) -> DomainMetadata:
        if self._view is None:
            self._view = DomainMetadata(self._store.values(), self._root.full(_METADATA))
        return self._view

    def _read_metadata(self) -> dict[str, str]:
        path = self._root.full(_METADATA)
        return from_lines(split_lines(self._root.read(_METADATA), path), path)

    @staticmethod
    def _text(values: Mapping[str, str]) -> bytes:
        return "".join(f"{line}\n" for line in to_lines(values)).encode()

    def _write_metadata(self, new: Mapping[str, str], old: Mapping[str, str]) -> None:
        self._root.replace(_METADATA, self._text(new), before=self._still_allowed)

    def refresh(self) -> None:
        self._store.invalidate()
        self._view = None
        self._listing = None

    def change(self, token: SpmToken, changes: Mapping[str, str | None]) -> None:
        token.check()
        self._view = None
        # Writing takes its time, and this process may be stopped meanwhile.
        self._still_allowed = token.check
        self._store.update(changes)
        if "VERSION" in changes:
            self.refresh()

    def become_master(self, token: SpmToken) -> None:
        """Make the directories that a master domain has."""
        token.check()
        self._make_master_tree()

    # Listing

    def image_names(self) -> list[str]:
        """Return the names of image directories, marks of removal included."""
        return [name for name in self._root.names("images") if is_id(name) or layout.removed_image(name)]

    def listing(self) -> dict[str, list[str]]:
        """Return the image directories by volume; of several, the volume's own first.

        Its own is the one that holds nothing else.  A record is read only
        where there are two of that kind, as when making a disk of a template
        was cut.
        """
        if self._listing is None:
            images: dict[str, list[str]] = {}
            self._data_only = {}
            self._with_note = {}
            crowd = {}
            for image in self.image_names():
                try:
                    names = self._root.names(f"images/{image}")
                except (NotFound, GateDenied):
                    # Purged meanwhile, or no directory of ours.
                    continue
                metas = {name.removesuffix(_META) for name in names if name.endswith(_META)}
                volumes = sorted(name for name in metas if is_id(name))
                crowd[image] = len(volumes)
                for volume in volumes:
                    images.setdefault(volume, []).append(image)
                for name in names:
                    if is_id(name) and name not in metas:
                        self._data_only[name] = image
                    elif name.endswith(_NOTE) and is_id(image):
                        self._with_note[name.removesuffix(_NOTE)] = image
            for volume, users in images.items():
                lone = [image for image in users if crowd[image] == 1 and is_id(image)]
                own = self._image_told(volume, lone[0]) if len(lone) > 1 else None
                users.sort(key=lambda image: (not is_id(image), crowd[image] != 1, image != own, image))
            self._listing = images
        return self._listing

    def _image_told(self, volume: str, image: str) -> str | None:
        """Return the image that the record of *volume*, a file in *image*, says it is of."""
        try:
            data = self._root.read(f"images/{image}/{volume}{_META}", limit=RECORD_SIZE * 8)
        except Error:
            return None
        return parse_lenient(data).values.get("image")

    def entries(self) -> dict[str, VolumeEntry]:
        found = {}
        for volume, names in self.listing().items():
            live = [name for name in names if is_id(name)]
            shown = live or [layout.removed_image(name) or name for name in names]
            parent = BLANK if len(names) > 1 else None
            found[volume] = VolumeEntry(volume, tuple(shown), parent, removed=not live)
        for volume, image in self._data_only.items():
            if volume not in found and is_id(image):
                found[volume] = VolumeEntry(volume, (image,), None, initializing=True)
        return found

    def _where(self, volume: str) -> str:
        """Return the path of a volume's data, in its own image."""
        check_id(volume, "volume UUID")
        users = self.listing().get(volume)
        if users:
            return f"images/{users[0]}/{volume}"
        if volume in self._data_only:
            return f"images/{self._data_only[volume]}/{volume}"
        raise NotFound(f"there is no volume {volume}", path=self.name)

    def path_of(self, volume: str) -> str:
        """Return the path of a volume's data, for programs and messages."""
        return self._root.full(self._where(volume))

    # Records

    def read_record(self, volume: str) -> bytes:
        return self._root.read(self._where(volume) + _META, limit=RECORD_SIZE * 8)

    def record(self, volume: str) -> VolumeMetadata:
        path = self._where(volume) + _META
        return parse(self._root.read(path, limit=RECORD_SIZE * 8), self._root.full(path))

    def write_record(
        self, token: SpmToken, volume: str, record: VolumeMetadata, overrides: Mapping[str, str] | None = None
    ) -> None:
        data = record.to_bytes(self.metadata.version, overrides)
        own = self._where(volume) + _META
        token.check()
        self._root.replace(own, data, before=token.check)
        for image in self.listing()[volume][1:]:
            # Replacing made a new file; the links in other images follow it.
            other = f"images/{image}/{volume}{_META}"
            self._root.unlink(other + layout.NEW_SUFFIX, missing_ok=True)
            self._root.link(own, other + layout.NEW_SUFFIX)
            self._root.rename(other + layout.NEW_SUFFIX, other)

    # Volumes

    def allocate(self, token: SpmToken, image: str, volume: str, size: int, note: str | None = None) -> None:
        check_id(image, "image UUID")
        check_id(volume, "volume UUID")
        if self.metadata.domain_class == ISO:
            raise IllegalSpec("an ISO domain has no volumes", kind=IllegalSpecKind.TYPE, path=self.name)
        if volume in self.listing() or volume in self._data_only:
            raise AlreadyExists(f"the volume {volume} exists", path=self.name)
        token.check()
        self._root.make_directory(f"images/{image}", exist_ok=True)
        if note is not None:
            path = f"images/{image}/{volume}{_NOTE}"
            self._root.replace(path, layout.check_note(note).encode(), before=token.check)
            self._with_note[volume] = image
        self._root.create(f"images/{image}/{volume}", size=size, mode=_MODE)
        self._data_only[volume] = image

    def publish(self, token: SpmToken, volume: str, record: VolumeMetadata) -> None:
        view = self.metadata
        data = record.to_bytes(view.version)
        path = self._where(volume)
        if layout.has_volume_leases(view.version, view.type):
            self.make_lease(token, volume)
        token.check()
        self._root.replace(path + _META, data, before=token.check)
        self._listing = None

    def make_lease(self, token: SpmToken, volume: str) -> None:
        view = self.metadata
        path = self._where(volume) + _LEASE
        area = resource_area(view.uuid, volume, block_size=view.block_size, alignment=view.alignment)
        token.check()
        if not self._root.exists(path):
            self._root.create(path, mode=_MODE)
        with self._root.open(path, writable=True) as storage:
            write_area(storage, 0, area)
        for image in self.listing().get(volume, [])[1:]:
            other = f"images/{image}/{volume}{_LEASE}"
            self._root.unlink(other, missing_ok=True)
            self._root.link(path, other)

    def abandon(self, token: SpmToken, image: str, volume: str) -> None:
        check_id(image, "image UUID")
        self._listing = None
        if volume in self.listing():
            raise Illegal(f"the volume {volume} is complete", path=self.name)
        token.check()
        path = f"images/{image}/{check_id(volume, 'volume UUID')}"
        if self._root.exists(f"images/{image}"):
            for suffix in (_LEASE, "", _NOTE):
                self._root.unlink(path + suffix, missing_ok=True)
            if not self._root.names(f"images/{image}"):
                self._root.remove_tree(f"images/{image}")
        self._data_only.pop(volume, None)
        self._listing = None
        if self._root.exists(f"images/{image}"):
            # A template linked here for this volume.
            self.sweep(token, [one for one in self.leftovers() if one.name == f"images/{image}"])

    def size_of(self, volume: str) -> int:
        return self._root.stat(self._where(volume)).st_size

    def usage_of(self, volume: str) -> int:
        return self._root.stat(self._where(volume)).st_blocks * 512

    def extend(self, token: SpmToken, volume: str, size: int) -> None:
        with self._root.open(self._where(volume), writable=True) as storage:
            if storage.size < size:
                token.check()
                storage.resize(size)
                storage.flush()

    def reduce(self, token: SpmToken, volume: str, size: int, *, zero: bool = False) -> None:
        """Files of images have the length they need; nothing is taken."""

    def open_volume(self, volume: str, *, writable: bool = False) -> FileStorage:
        return self._root.storage(self._where(volume), writable=writable)

    def require_unused(self, volumes: Sequence[str]) -> None:
        """Nothing: files do not tell; images are locked where they are opened."""

    def share(self, token: SpmToken, volume: str, image: str) -> None:
        check_id(image, "image UUID")
        own = self._where(volume)
        token.check()
        self._root.make_directory(f"images/{image}", exist_ok=True)
        view = self.metadata
        suffixes = ["", _LEASE, _META] if layout.has_volume_leases(view.version, view.type) else ["", _META]
        for suffix in suffixes:
            target = f"images/{image}/{volume}{suffix}"
            if not self._root.exists(target):
                self._root.link(own + suffix, target)
        self._listing = None

    def set_parent_hint(self, token: SpmToken, volume: str, parent: str) -> None:
        """File domains keep the parent in the record only."""

    def set_writable(self, token: SpmToken, volumes: Sequence[str], writable: bool) -> None:
        for volume in volumes:
            token.check()
            self._root.chmod(self._where(volume), _MODE if writable else _READ_ONLY_MODE)

    def notes(self) -> dict[str, str]:
        found = {}
        for volume, users in self.listing().items():
            image = self._with_note.get(volume)
            if image is not None and image in users:
                data = self._root.read(f"images/{image}/{volume}{_NOTE}", limit=256)
                found[volume] = data.decode("ascii", "replace")
        return found

    def set_note(self, token: SpmToken, volume: str, note: str | None) -> None:
        path = self._where(volume)
        token.check()
        if note is None:
            self._root.unlink(path + _NOTE, missing_ok=True)
            self._with_note.pop(volume, None)
        else:
            self._root.replace(path + _NOTE, layout.check_note(note).encode(), before=token.check)
            self._with_note[volume] = path.split("/")[1]

    def set_notes(self, token: SpmToken, volumes: Sequence[str], note: str | None) -> None:
        for volume in volumes:
            self.set_note(token, volume, note)

    def lease(self, volume: str) -> Lease | None:
        view = self.metadata
        if not layout.has_volume_leases(view.version, view.type):
            return None
        return Lease(view.uuid, volume, LeaseArea(self._root.full(self._where(volume) + _LEASE), 0))

    def lease_leader(self, volume: str) -> Leader | None:
        with self._root.open(self._where(volume) + _LEASE) as storage:
            return read_leader(storage, 0)

    # Removal

    def mark_removed(self, token: SpmToken, image: str, volumes: Sequence[str], *, zero: bool = False) -> None:
        check_id(image, "image UUID")
        source, target = f"images/{image}", f"images/{_REMOVED}{image}"
        present = {volume for volume, names in self.listing().items() if image in names}
        missing = set(volumes) - present
        if missing:
            raise NotFound(f"there is no volume {min(missing)} in image {image}", path=self.name)
        token.check()
        self._listing = None
        foreign = {volume for volume in present - set(volumes) if len(self.listing()[volume]) > 1}
        if present - foreign == set(volumes) and not self._root.exists(target):
            self._root.rename(source, target)
        else:
            self._root.make_directory(target, exist_ok=True)
            for volume in volumes:
                for suffix in (_META, "", _LEASE, _NOTE):
                    if self._root.exists(f"{source}/{volume}{suffix}"):
                        self._root.rename(f"{source}/{volume}{suffix}", f"{target}/{volume}{suffix}")
        self._listing = None

    def purge(self, token: SpmToken, image: str, *, wiped: Collection[str] = ()) -> None:
        token.check()
        self._root.remove_tree(f"images/{_REMOVED}{check_id(image, 'image UUID')}")
        self._listing = None

    def leftovers(self) -> list[Leftover]:
        return find_leftovers(self._root, self.image_names(), self.listing(), self.notes().values())

    def sweep(self, token: SpmToken, leftovers: Sequence[Leftover]) -> None:
        sweep_leftovers(token, self._root, leftovers)
        self._listing = None

    def capacity(self) -> tuple[int, int]:
        state = os.statvfs(self._root.path)
        return state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize

    def external_leases(self) -> dict[str, ExternalLease] | None:
        """Return external leases by name, ``None`` where the domain has none."""
        view = self.metadata
        if not layout.has_xleases(view.version, view.type):
            return None
        with self._root.open("dom_md/xleases") as storage:
            volume = XleaseVolume(storage, path=storage.name, block_size=view.block_size, alignment=view.alignment)
            return volume.load().leases(view.alignment)
