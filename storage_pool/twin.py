# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A second set of bytes for a volume, made beside it, that takes its place by renames.

The twin of volume V is called ``V_MERGE``, what it replaced ``_remove_me_V``;
older hosts used the same names.  Neither is a volume to any reader: a file
without a record, a logical volume with the tag of unfinished ones.

Invariant: V's lease and slot stay V's, under V's name, and nobody else gets the
slot meanwhile.  On a V1 volume group the slot is a place on a device: there
the record is in the twin's slot before V's name moves, and the old one is
cleared after the old bytes are gone.  :func:`swap_twin` may be cut at any
point and called again; with it every twin may be dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcowlib.units import MiB, ceil_div

from . import layout
from .block_domain import BlockDomain
from .domain import Domain
from .errors import MetadataError, NotFound, UnsupportedVersion
from .file_domain import FileDomain
from .ids import check_id
from .lv_storage import open_logical_volume
from .metadata_volume import RECORD_SIZE
from .wiping import wipe

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

    from .token import SpmToken

__all__ = ["drop_twin", "make_twin", "open_twin", "swap_twin"]


def _names(volume: str) -> tuple[str, str]:
    check_id(volume, "volume UUID")
    return f"{volume}{layout.TWIN_SUFFIX}", f"{layout.REMOVED_PREFIX}{volume}"


def _kind(domain: Domain) -> FileDomain | BlockDomain:
    if isinstance(domain, FileDomain | BlockDomain):
        return domain
    raise UnsupportedVersion("volumes of such a domain have no twins", path=domain.name)


def _folder(domain: FileDomain, volume: str) -> str:
    return f"images/{domain.entries()[volume].images[0]}"


def make_twin(token: SpmToken, domain: Domain, volume: str, size: int) -> None:
    """Make an empty twin; on block storage with room for *size* bytes.  A former one is dropped.

    Raises: MetadataError where a V1 domain has no slot for it, NoSpace, StorageError, LvmError.
    """
    twin, _ = _names(volume)
    own = _kind(domain)
    drop_twin(token, domain, volume)
    token.check()
    if isinstance(own, FileDomain):
        own.root.create(f"{_folder(own, volume)}/{twin}")
    else:
        own.lvm.create_volume(own.uuid, twin, ceil_div(max(size, 1), MiB), [layout.TAG_INITIALIZING])
        own.changed()
        if not own.metadata.version and own.place_slot(own.state.lv(twin)) is None:
            drop_twin(token, domain, volume)
            raise MetadataError("LVM put the volume where a V1 domain has no slot for it", path=own.name)


def open_twin(domain: Domain, volume: str) -> Storage:
    """Return the bytes of a volume's twin for writing."""
    twin, _ = _names(volume)
    own = _kind(domain)
    if isinstance(own, FileDomain):
        return own.root.storage(f"{_folder(own, volume)}/{twin}", writable=True)
    return open_logical_volume(own.lvm, own.state, twin, writable=True)


def swap_twin(token: SpmToken, domain: Domain, volume: str, image: str, parent: str, slot: int) -> None:
    """Put the twin in the volume's place, or end that; *image*, *parent* and *slot* are the volume's from now on."""
    own = _kind(domain)
    if isinstance(own, FileDomain):
        _swap_file(token, own, volume)
    else:
        tags = layout.volume_tags(slot if own.metadata.version else None, parent, image)
        _swap_logical_volume(token, own, volume, tags)


def _swap_file(token: SpmToken, domain: FileDomain, volume: str) -> None:
    folder = _folder(domain, volume)
    twin, old = (f"{folder}/{name}" for name in _names(volume))
    if not domain.root.exists(twin):
        return
    token.check()
    if not domain.root.exists(old):
        # The second name keeps the bytes; at no moment is there no file of the volume's name.
        domain.root.link(f"{folder}/{volume}", old)
    domain.root.rename(twin, f"{folder}/{volume}")


def _swap_logical_volume(token: SpmToken, domain: BlockDomain, volume: str, tags: list[str]) -> None:
    twin, old = _names(volume)
    mark = layout.TAG_INITIALIZING
    lvm, name = domain.lvm, domain.uuid
    if twin in domain.state.lvs and volume in domain.state.lvs:
        slot = None if domain.metadata.version else domain.place_slot(domain.state.lv(twin))
        if slot is not None:
            domain.write_slot(token, slot, domain.read_record(volume))
        token.check()
        lvm.rename_volume(name, volume, old)
        domain.changed()
    if twin in domain.state.lvs:
        state = domain.state.lv(old)
        if mark not in state.tags:
            token.check()
            # The slot stays taken while no volume has its tag.
            gone = sorted(tag for tag in state.tags if not tag.startswith(layout.TAG_SLOT))
            domain.retag([old], add=[mark], remove=gone)
        token.check()
        lvm.rename_volume(name, twin, volume)
        domain.changed()
    if mark in domain.state.lv(volume).tags:
        token.check()
        domain.retag([volume], add=tags, remove=[mark])


def drop_twin(token: SpmToken, domain: Domain, volume: str, *, zero: bool = False) -> None:
    """Remove a twin that was not swapped in, and what one that was has replaced; with *zero* after overwriting them."""
    own = _kind(domain)
    names = _names(volume)
    token.check()
    if isinstance(own, FileDomain):
        for path in (f"{_folder(own, volume)}/{name}" for name in names):
            # A second link is the volume itself.
            if zero and own.root.exists(path) and own.root.stat(path).st_nlink == 1:
                with own.root.open(path, writable=True) as storage:
                    wipe(token, storage, allocate=True)
            own.root.unlink(path, missing_ok=True)
        return
    if volume not in own.state.lvs:
        raise NotFound(f"there is no volume {volume}", path=own.name)
    present = [name for name in names if name in own.state.lvs]
    if not present:
        return
    if zero:
        for name in present:
            own.overwrite(token, name)
    places = [] if own.metadata.version else [own.place_slot(own.state.lvs[name]) for name in present]
    token.check()
    own.lvm.remove_volumes(own.uuid, present)
    own.changed()
    for slot in places:
        if slot is not None:
            own.write_slot(token, slot, bytes(RECORD_SIZE))
