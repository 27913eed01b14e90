# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Domains and disks as the engine gives them to a tool (:mod:`.engine`).

Invariant: nothing of its own is kept here but the open domain; what a handle
answers is read when it is asked.  Every change goes through
:meth:`Context.change`, which adds the right to make it, and what takes space
through the space policy before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec, TypeVar

import qcowlib

from . import block_group, exchange, image_group, iso, merge, merge_swap, snapshot, transfer, volume, volume_jobs
from .block_domain import BlockDomain
from .check import DomainReport, check_domain, mend
from .domain import Domain
from .errors import Illegal, NotFound, printable
from .file_domain import FileDomain
from .ids import BLANK, make_id
from .locking import Locks, Wanted
from .metadata_volume import PREALLOCATED, RAW, SHARED, SPARSE, VolumeMetadata
from .sizes import CHUNK
from .space import Space, SpacePolicy, account
from .stream import Progress, Readable, Received, Writable
from .upgrade import upgrade

if TYPE_CHECKING:
    from qcowlib.driver import Bitmap

    from .token import SpmToken

__all__ = ["AnyDomain", "Context", "Disk", "EngineDomain"]

AnyDomain = FileDomain | BlockDomain
P = ParamSpec("P")
R = TypeVar("R")


def _silent(done: int, total: int) -> None:
    """Tell nobody."""


class Context:
    """What the parts of one engine share.

    The right to change, the clock (seconds since 1970), the space policy, and
    how to *find* an open domain by UUID.
    """

    __slots__ = ("_locks", "_take", "_token", "find", "now", "space")

    def __init__(
        self,
        take: Callable[[], SpmToken],
        now: Callable[[], int],
        space: SpacePolicy,
        find: Callable[[str], AnyDomain],
    ) -> None:
        self._take = take
        self._token: SpmToken | None = None
        self._locks = Locks()
        self.now = now
        self.space = space
        self.find = find

    @property
    def token(self) -> SpmToken:
        """The right to change, taken at the first change.  Raises: Busy, NotAuthorized."""
        if self._token is None:
            self._token = self._take()
        return self._token

    def change(self, work: Callable[Concatenate[SpmToken, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Do *work* with the right to change before its other arguments; other threads leave its domains alone."""
        domains = (arg for arg in (*args, *kwargs.values()) if isinstance(arg, FileDomain | BlockDomain))
        with self._locks.guard(Wanted(domain.uuid) for domain in domains):
            return work(self.token, *args, **kwargs)


class EngineDomain:
    """A domain: what is in it, how it is, and what can be made in it.

    ``domain`` is the open :class:`~storage_pool.file_domain.FileDomain` or
    :class:`~storage_pool.block_domain.BlockDomain`.
    """

    __slots__ = ("_context", "domain")

    def __init__(self, context: Context, domain: AnyDomain) -> None:
        self._context = context
        self.domain = domain

    @property
    def uuid(self) -> str:
        """Its UUID."""
        return self.domain.uuid

    @property
    def name(self) -> str:
        """What people call it."""
        return self.domain.metadata.description

    @property
    def version(self) -> int:
        """Version of its metadata; V1 is 0."""
        return self.domain.metadata.version

    def info(self) -> dict[str, object]:
        """Return what reports show of it: its keys, its space, what to warn of."""
        total, free = self.domain.capacity()
        return {
            **self.domain.metadata.info(),
            "path": self.domain.name,
            "total": total,
            "free": free,
            "warnings": self.warnings(),
        }

    def space(self) -> Space:
        """Return how full it is and how much was promised."""
        return account(self.domain)

    def warnings(self) -> list[str]:
        """Return limits and low space worth telling people, each with its figure."""
        found = self.domain.warnings() if isinstance(self.domain, BlockDomain) else []
        return found + self._context.space.warnings(self.space())

    def require(self, needed: int) -> None:
        """Refuse what would leave too little space.  Raises: NoSpace."""
        self._context.space.require(Space(*self.domain.capacity(), 0, 0, 0), needed, self.domain.name)

    # Disks

    def disks(self) -> list[Disk]:
        """Return its disks and templates, by UUID."""
        entries = self.domain.entries().values()
        images = {entry.images[0] for entry in entries if not (entry.removed or entry.initializing)}
        return [Disk(self._context, self, image) for image in sorted(images)]

    def disk(self, image: str) -> Disk:
        """Return a disk.  Raises: NotFound."""
        image_group.ImageGroup.load(self.domain, image)
        return Disk(self._context, self, image)

    def create_disk(
        self,
        size: int = 0,
        *,
        template: Disk | None = None,
        format: Literal["COW", "RAW"] = "COW",
        preallocated: bool = False,
        description: str = "",
    ) -> Disk:
        """Make a disk of *size* bytes, empty or thin on a *template* (whose size it has by default).

        Raises: IllegalSpec, Illegal, NoSpace.
        """
        parent = BLANK if template is None else template.leaf
        if template is not None:
            size = size or template.size
        kind = PREALLOCATED if preallocated or (format == RAW and self.domain.block) else SPARSE
        self.require(size if kind == PREALLOCATED else self.thin_start(size))
        spec = volume.VolumeSpec(make_id(), make_id(), size, format, kind, parent, description=description)
        self._context.change(volume.create_volume, self.domain, spec, self._context.now())
        return Disk(self._context, self, spec.image)

    def thin_start(self, capacity: int) -> int:
        """Return the bytes that a new thin volume takes at once."""
        return min(CHUNK, capacity) if self.domain.block else 0

    def upload(
        self,
        stream: Readable,
        size: int,
        *,
        content: Literal["raw", "qcow2"] = "raw",
        description: str = "",
        sha256: str | None = None,
        progress: Progress = _silent,
    ) -> Disk:
        """Make a disk of a stream; see :func:`.exchange.upload`."""
        self.require(size)
        made = self._context.change(
            exchange.upload,
            self.domain,
            stream,
            size,
            ctime=self._context.now(),
            content=content,
            description=description,
            sha256=sha256,
            progress=progress,
        )
        return Disk(self._context, self, made.image)

    # Health

    def check(self) -> DomainReport:
        """Compare all that it says about its volumes; reads only."""
        return check_domain(self.domain)

    def mend(self) -> DomainReport:
        """End what was cut, moves out of it too, and mend what has a rule; returns what is left."""
        return self._context.change(mend, self.domain, find=self._context.find)

    def upgrade(self, version: int) -> list[str]:
        """Convert it in place; returns problems of single volumes."""
        return list(self._context.change(upgrade, self.domain, version, ctime=self._context.now()))

    def destroy(self) -> None:
        """Remove it with everything in it.  Raises: Illegal while it is attached."""
        if isinstance(self.domain, BlockDomain):
            self._context.change(block_group.destroy_block_domain, self.domain)
        else:
            self._context.change(self.domain.destroy)

    # Devices of a volume group

    def _group(self) -> BlockDomain:
        if not isinstance(self.domain, BlockDomain):
            raise Illegal("a domain in a directory has no devices", path=self.domain.name)
        return self.domain

    def extend(self, devices: Sequence[str], *, force: bool = False) -> None:
        """Add devices."""
        self._context.change(block_group.extend_block_domain, self._group(), devices, force=force)

    def reduce(self, device: str) -> None:
        """Take an empty device out."""
        self._context.change(block_group.reduce_block_domain, self._group(), device)

    def resize(self, device: str) -> None:
        """Let it see that a device has grown."""
        self._context.change(block_group.resize_device, self._group(), device)

    # Media of an ISO domain

    def _files(self) -> FileDomain:
        if not isinstance(self.domain, FileDomain):
            raise Illegal("a volume group holds no files", path=self.domain.name)
        return self.domain

    def media(self) -> dict[str, int]:
        """Return size by name of the media."""
        return iso.list_media(self._files())

    def upload_media(
        self, name: str, stream: Readable, *, sha256: str | None = None, progress: Progress = _silent
    ) -> Received:
        """Put a medium into it."""
        return self._context.change(iso.upload_media, self._files(), name, stream, sha256=sha256, progress=progress)

    def remove_media(self, name: str) -> None:
        """Remove a medium.  Raises: NotFound, InvalidName."""
        self._context.change(iso.remove_media, self._files(), name)

    def refresh(self) -> None:
        """Forget what was read; other hosts may have changed it."""
        self.domain.refresh()

    def reopen(self) -> None:
        """Open it anew, as after its storage was away; ``domain`` is another object then."""
        if isinstance(self.domain, BlockDomain):
            self.domain.refresh()
            return
        made = FileDomain.open(self.domain.name)
        self.domain.close()
        self.domain = made

    def close(self) -> None:
        """Close it."""
        self.domain.close()


class Disk:
    """A disk or template, by its image UUID in one domain."""

    __slots__ = ("_context", "home", "image")

    def __init__(self, context: Context, home: EngineDomain, image: str) -> None:
        self._context = context
        self.home = home
        self.image = image

    def __repr__(self) -> str:
        return f"<storage_pool.Disk {self.image}>"

    def _group(self) -> image_group.ImageGroup:
        return image_group.ImageGroup.load(self.home.domain, self.image)

    def _record(self) -> VolumeMetadata:
        return self.home.domain.record(self.leaf)

    @property
    def leaf(self) -> str:
        """The volume that takes the writes.  Raises: Illegal during a preview, when there are two."""
        return self._group().leaf()

    @property
    def chain(self) -> list[str]:
        """Its volumes from the leaf down, a template's included."""
        return self._group().chain()

    @property
    def snapshots(self) -> list[str]:
        """Its snapshots, the newest first: its own volumes below the leaf."""
        group = self._group()
        own = set(group.own())
        return [member for member in group.chain()[1:] if member in own]

    @property
    def size(self) -> int:
        """Bytes as a guest sees them."""
        return self._record().capacity

    @property
    def is_template(self) -> bool:
        """Whether it is a template."""
        return self._record().voltype == SHARED

    @property
    def description(self) -> str:
        """The description of its leaf."""
        return self._record().description

    def open(self, mode: Literal["r", "r+"] = "r", *, volume_id: str | None = None) -> qcowlib.Image:
        """Open it, or one volume of it, with the chain below."""
        return volume.open_image(self.home.domain, volume_id or self.leaf, writable=mode == "r+")

    def _change(
        self, work: Callable[Concatenate[SpmToken, Domain, str, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Do *work* to this disk."""
        return self._context.change(work, self.home.domain, self.image, *args, **kwargs)

    def _job(
        self,
        work: Callable[Concatenate[SpmToken, Domain, str, P], R],
        volume_id: str | None,
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Do *work* to one of its own volumes, the leaf by default.  Raises: NotFound."""
        chosen = volume_id or self.leaf
        if chosen not in self._group().own():
            raise NotFound(f"the disk has no volume {printable(chosen[:64])}", path=self.home.domain.name)
        return self._context.change(work, self.home.domain, chosen, *args, **kwargs)

    def _copy(
        self,
        work: Callable[Concatenate[SpmToken, Domain, str, Domain, P], R],
        to: EngineDomain,
        volumes: Iterable[str],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Do *work*, which copies *volumes*, where there is room for them."""
        to.require(sum(self.home.domain.usage_of(member) for member in volumes))
        return self._change(work, to.domain, *args, **kwargs)

    def extend(self, size: int) -> None:
        """Make it larger."""
        self._job(volume.extend_capacity, None, size)

    def remove(self, *, zero: bool = False, discard: bool = False) -> None:
        """Remove it; *zero* overwrites its data first, *discard* gives the blocks back.

        Raises: Illegal for a template in use.
        """
        self._change(volume.remove_volumes, self._group().own(), zero=zero, discard=discard)

    # Snapshots

    def snapshot(self, *, copy_bitmaps: bool = False) -> str:
        """Take a snapshot while nobody writes; returns its volume, and a new leaf takes the writes.

        With *copy_bitmaps* dirty bitmaps go on in the new leaf.
        """
        taken = self.leaf
        self.home.require(self.home.thin_start(self.size))
        self._change(snapshot.create_snapshot, ctime=self._context.now(), copy_bitmaps=copy_bitmaps)
        return taken

    def preview(self, taken: str) -> str:
        """Make a second leaf on a snapshot and return it."""
        return self._change(snapshot.preview, taken, ctime=self._context.now())

    def undo(self, previewed: str, *, zero: bool = False) -> None:
        """Drop a preview; *zero* overwrites its data first."""
        self._change(snapshot.undo_preview, previewed, zero=zero)

    def commit(self, previewed: str, *, zero: bool = False) -> list[str]:
        """Make a preview the disk; returns the volumes that were dropped, with *zero* after overwriting their data."""
        return self._change(snapshot.commit_preview, previewed, zero=zero)

    def delete_snapshot(self, taken: str, *, by_renames: bool = False, zero: bool = False) -> str:
        """Delete a snapshot, so that the disk stays; returns the volume that has its data now.

        What came after it is merged into it.  *by_renames* makes a new volume
        of both instead, which takes the name of the one above
        (:func:`.merge_swap.merge_by_swap`).  *zero* overwrites data whose space others get.

        Raises: NotFound, Illegal.
        """
        group = self._group()
        if taken not in group.own():
            raise NotFound(f"the disk has no volume {printable(taken[:64])}", path=self.home.domain.name)
        above = group.children(taken)
        if len(above) != 1:
            raise Illegal(f"{len(above)} volumes stand on the snapshot {taken}", path=self.home.domain.name)
        if by_renames:
            return self._change(merge_swap.merge_by_swap, taken, zero=zero)
        return self._change(merge.merge, above[0], zero=zero)

    def sync_chain(self, actual: Sequence[str]) -> list[str]:
        """Let records follow a merge that a running guest made; *actual* is its chain from the leaf down."""
        return self._change(merge.sync_chain, actual)

    # Jobs on one volume, the leaf by default

    def sparsify(self) -> int:
        """Give back the space of zeros that its leaf stores; returns the bytes of zeros found."""
        return self._job(volume_jobs.sparsify, None)

    def reduce(self, volume_id: str | None = None) -> int:
        """Reduce a volume on block storage to what it needs; returns its bytes."""
        return self._job(volume_jobs.reduce_to_optimal, volume_id)

    def amend(self, level: Literal["0.10", "1.1"], volume_id: str | None = None) -> None:
        """Bring a COW volume to a level of its format."""
        self._job(volume_jobs.amend, volume_id, level)

    def bitmaps(self, volume_id: str | None = None) -> list[Bitmap]:
        """Return the dirty bitmaps of a COW volume."""
        with volume.open_image(self.home.domain, volume_id or self.leaf, backing=False) as image:
            return image.bitmaps()

    def add_bitmap(
        self, name: str, volume_id: str | None = None, *, granularity: int | None = None, enabled: bool = True
    ) -> None:
        """Let changes be recorded in a new bitmap.  Raises: IllegalSpec below domain version 4."""
        self._job(volume_jobs.add_bitmap, volume_id, name, granularity=granularity, enabled=enabled)

    def remove_bitmap(self, name: str, volume_id: str | None = None) -> None:
        """Delete a bitmap."""
        self._job(volume_jobs.remove_bitmap, volume_id, name)

    def clear_bitmap(self, name: str, volume_id: str | None = None) -> None:
        """Forget what a bitmap has recorded."""
        self._job(volume_jobs.clear_bitmap, volume_id, name)

    # Copies

    def make_template(
        self, *, to: EngineDomain | None = None, description: str | None = None, progress: Progress = _silent
    ) -> Disk:
        """Make a template of what it reads as."""
        target, now = to or self.home, self._context.now()
        made, _ = self._copy(
            transfer.make_template, target, self.chain, ctime=now, description=description, progress=progress
        )
        return Disk(self._context, target, made)

    def clone(self, *, to: EngineDomain | None = None, progress: Progress = _silent) -> Disk:
        """Make a disk of one volume that reads as this one."""
        target, now = to or self.home, self._context.now()
        made, _ = self._copy(transfer.collapse, target, self.chain, ctime=now, progress=progress)
        return Disk(self._context, target, made)

    def copy(self, *, to: EngineDomain | None = None, progress: Progress = _silent) -> Disk:
        """Copy it with its snapshots; into another domain its UUIDs stay."""
        target, now = to or self.home, self._context.now()
        made = self._copy(transfer.copy_image, target, self._group().own(), ctime=now, progress=progress)
        return Disk(self._context, target, made)

    def move(self, to: EngineDomain, *, progress: Progress = _silent) -> Disk:
        """Move it to another domain."""
        self._copy(exchange.move_image, to, self._group().own(), ctime=self._context.now(), progress=progress)
        self.home = to
        return self

    def export(self, to: EngineDomain, *, progress: Progress = _silent) -> Disk:
        """Copy it to an export domain."""
        self._copy(exchange.export_image, to, self._group().own(), ctime=self._context.now(), progress=progress)
        return Disk(self._context, to, self.image)

    def remove_exported(self) -> None:
        """Remove it from its export domain; a template that disks there stand on becomes a fake one."""
        self._change(exchange.remove_exported)

    def import_to(
        self, target: EngineDomain, *, new_ids: bool = False, flat: bool = False, progress: Progress = _silent
    ) -> Disk:
        """Copy it from its export domain into a data domain."""
        now, own = self._context.now(), self._group().own()
        made = self._copy(exchange.import_image, target, own, ctime=now, new_ids=new_ids, flat=flat, progress=progress)
        return Disk(self._context, target, made)

    def download(self, sink: Writable, *, volume_id: str | None = None, progress: Progress = _silent) -> Received:
        """Write what a guest reads of it to *sink*."""
        return exchange.download(self.home.domain, self.image, sink, volume=volume_id, progress=progress)
