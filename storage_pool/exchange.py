# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Disks that change places: moved between domains, exported and imported, uploaded and downloaded.

An export domain belongs to one pool at a time and carries disks between them.
A disk that is exported without its template stands there on a *fake* one: an
empty volume with the template's UUIDs and legality FAKE, which is filled when
the template is exported and made empty again when it is removed first.

Invariant: a disk is whole in one place at every moment.  A move notes its
target before it copies and removes the source only after every volume of the
target is LEGAL; :func:`recover_moves` ends or takes back one that was cut.
What a FAKE template holds is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import qcowlib
from qcowlib.errors import Error, UnsupportedFeature
from qcowlib.ondisk.header import Header
from qcowlib.qcow2.check import check
from qcowlib.units import round_up

from . import metadata_volume as mv
from .copying import copy_disk
from .domain import Domain
from .errors import AlreadyExists, Illegal, NotAuthorized, NotFound, UnsupportedVersion
from .ids import BLANK, make_id
from .image_group import ImageGroup
from .metadata_domain import BACKUP
from .metadata_volume import COW, FAKE, RAW, SHARED, SPARSE
from .sizes import PAGE, optimal_cow_size
from .stream import PIECE, Progress, Readable, Received, Writable, read_piece, receive, send
from .transfer import arriving, collapse, copy_image, recover_copies
from .volume import (
    IMAGE_FORMATS,
    VolumeSpec,
    children_of,
    create_volume,
    format_volume,
    open_image,
    operation,
    remove_volumes,
    set_parent_name,
    update_volume,
)

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = [
    "Uploaded",
    "download",
    "export_image",
    "import_image",
    "move_image",
    "recover_moves",
    "remove_exported",
    "upload",
]

_NOTE: Final = "move:"
#: The end of a move for now whose target is not to be found.
AWAY: Final = "its target is away"
FAKE_DESCRIPTION: Final = "Fake volume"


def _silent(done: int, total: int) -> None:
    """Tell nobody."""


# Moving


def move_image(
    token: SpmToken, source: Domain, image: str, target: Domain, *, ctime: int, progress: Progress = _silent
) -> None:
    """Move a disk to another domain; all UUIDs stay.  Its template must be there.

    Raises: Illegal for a previewed disk, a template in use and within one
    domain, AlreadyExists when the target has the disk, and what copying raises.
    """
    if source.uuid == target.uuid:
        raise Illegal("source and target are one domain", path=source.name)
    group = ImageGroup.load(source, image)
    leaf = group.leaf()
    for volume in group.own():
        users = set(group.entries[volume].images) - {image}
        if users:
            raise Illegal(f"the template {volume} is used by {len(users)} disks", path=source.name)
    _refuse_present(target, image)
    source.set_note(token, leaf, f"{_NOTE}{target.uuid}")
    try:
        copy_image(token, source, image, target, ctime=ctime, progress=_told(token, progress))
    except Exception:
        source.set_note(token, leaf, None)
        raise
    remove_volumes(token, source, image, group.own(), force=True)


def _told(token: SpmToken, progress: Progress) -> Callable[[int, int], None]:
    """Return a progress that also asks for the right to go on."""

    def told(done: int, total: int) -> None:
        token.check()
        progress(done, total)

    return told


def _refuse_present(target: Domain, image: str) -> None:
    if any(entry.images[:1] == (image,) for entry in target.entries().values() if not entry.removed):
        raise AlreadyExists(f"the image {image} is there already", path=target.name)


def recover_moves(token: SpmToken, source: Domain, find: Callable[[str], Domain]) -> dict[str, str]:
    """End moves out of *source* that were cut; *find* opens a domain by UUID.

    Returns by image ``moved``, ``taken back`` or, where its target cannot be
    opened, :data:`AWAY`: nothing is done to such a disk.
    """
    source.refresh()
    # What is out of sight is moved, only its space is not given back yet.
    source.sweep(token, [left for left in source.leftovers() if left.kind.startswith("removed")])
    ended = {}
    for leaf, note in sorted(source.notes().items()):
        if not note.startswith(_NOTE):
            continue
        entries = source.entries()
        image = entries[leaf].images[0]
        left = sorted(v for v, e in entries.items() if e.images[:1] == (image,) and not (e.removed or e.initializing))
        try:
            target = find(note.removeprefix(_NOTE))
        except NotAuthorized:
            raise
        except (Error, OSError):
            # Away or unreadable: nothing tells whether the copy arrived.
            ended[image] = AWAY
            continue
        if _arrived(token, target, leaf):
            remove_volumes(token, source, image, left, force=True)
            source.purge(token, image)
            ended[image] = "moved"
        else:
            source.set_note(token, leaf, None)
            ended[image] = "taken back"
    return ended


def _arrived(token: SpmToken, target: Domain, leaf: str) -> bool:
    """Whether the copy in the target is complete; what there is of it is removed where not.

    Only the target tells: the source may have lost volumes already.
    """
    recover_copies(token, target)
    target.sweep(token, [left for left in target.leftovers() if left.kind == "unfinished volume"])
    entry = target.entries().get(leaf)
    return entry is not None and not entry.removed and target.record(leaf).legality == mv.LEGAL


# Export domains


def _require_export(domain: Domain) -> None:
    if domain.metadata.domain_class != BACKUP:
        raise Illegal("not an export domain", path=domain.name)


def export_image(
    token: SpmToken, source: Domain, image: str, export: Domain, *, ctime: int, progress: Progress = _silent
) -> None:
    """Copy a disk or template to an export domain; all UUIDs stay.

    A template that is not there is replaced by a fake one; exporting the
    template fills it, which may be run again after a cut.

    Raises: Illegal, AlreadyExists, and what copying raises.
    """
    _require_export(export)
    group = ImageGroup.load(source, image)
    chain = group.chain()
    base = chain[-1]
    there = export.entries().get(base)
    if group.records[base].voltype == SHARED and group.entries[base].images[0] == image:
        if there is not None and _fillable(export, base):
            _fill(token, source, base, export, progress)
            return
    elif group.records[base].voltype == SHARED and there is None:
        _make_fake(token, export, base, group.records[base], ctime)
    _refuse_present(export, image)
    copy_image(token, source, image, export, ctime=ctime, progress=_told(token, progress))


def _fillable(export: Domain, volume: str) -> bool:
    record = export.record(volume)
    return record.legality == FAKE or (record.legality == mv.ILLEGAL and record.description == FAKE_DESCRIPTION)


def _make_fake(token: SpmToken, export: Domain, volume: str, real: mv.VolumeMetadata, ctime: int) -> None:
    spec = VolumeSpec(real.image, volume, real.capacity, description=FAKE_DESCRIPTION, legality=FAKE)
    create_volume(token, export, spec, ctime)
    update_volume(token, export, volume, role=SHARED)


def _fill(token: SpmToken, source: Domain, volume: str, export: Domain, progress: Progress) -> None:
    """Give a fake template its data, its format and its own description.

    The links of the disks that stand on it stay.  Until the last byte is
    there it is ILLEGAL; an error makes it fake again.
    """
    real = source.record(volume)
    try:
        with operation(token, export, volume), _unlocked(token, export, volume):
            _empty(token, export, volume, real.format, real.type)
            with (
                open_image(source, volume) as before,
                _open_fake(export, volume) as after,
            ):
                copy_disk(token, before, after, target_is_zero=True, progress=progress)
    except Exception:
        export.write_record(token, volume, export.record(volume)._replace(legality=FAKE))
        raise
    filled = export.record(volume)._replace(description=real.description, disktype=real.disktype)
    export.write_record(token, volume, filled)


@contextmanager
def _unlocked(token: SpmToken, export: Domain, volume: str) -> Iterator[None]:
    """A template of an export domain may be written inside."""
    export.set_writable(token, [volume], True)
    try:
        yield
    finally:
        export.set_writable(token, [volume], False)


def _open_fake(export: Domain, volume: str) -> qcowlib.Image:
    """Open a template that is being filled for writing."""
    fmt = IMAGE_FORMATS[export.record(volume).format]
    storage = export.open_volume(volume, writable=True)
    try:
        return qcowlib.open(storage, "r+", format=fmt, backing=False)
    except BaseException:
        storage.close()
        raise


def _empty(token: SpmToken, export: Domain, volume: str, fmt: str, kind: str) -> None:
    """Make a template that nobody reads empty, of this format, which what stands on it names."""
    record = export.record(volume)._replace(format=fmt, type=kind, parent=BLANK)
    export.write_record(token, volume, record)
    token.check()
    with closing(export.open_volume(volume, writable=True)) as storage:
        storage.resize(0)
    format_volume(export, record, volume, None)
    for child in children_of(export, volume):
        set_parent_name(token, export, child, volume, fmt)


def remove_exported(token: SpmToken, export: Domain, image: str) -> None:
    """Remove a disk or template from an export domain.

    A template that disks there stand on becomes a fake one; a fake one goes
    with the last disk that stands on it.

    Raises: NotFound, Illegal.
    """
    _require_export(export)
    group = ImageGroup.load(export, image)
    base = group.chain()[-1] if group.leaves() else group.own()[0]
    record = group.records[base]
    own = group.own()
    if record.voltype == SHARED and base in own and children_of(export, base):
        fake = record._replace(legality=FAKE, description=FAKE_DESCRIPTION)
        export.write_record(token, base, fake)
        with _unlocked(token, export, base):
            _empty(token, export, base, COW, SPARSE)
        return
    remove_volumes(token, export, image, own)
    if base not in own and record.legality == FAKE and not children_of(export, base):
        remove_volumes(token, export, record.image, [base])


def import_image(
    token: SpmToken,
    export: Domain,
    image: str,
    target: Domain,
    *,
    ctime: int,
    new_ids: bool = False,
    flat: bool = False,
    progress: Progress = _silent,
) -> str:
    """Copy a disk or template from an export domain; returns the image made.

    *new_ids* imports it beside the one it was exported from; *flat* makes one
    volume of its chain.

    Raises: NotFound when its template is not in the target, Illegal when it
    has to be read and is a fake.
    """
    _require_export(export)
    group = ImageGroup.load(export, image)
    chain = group.chain()
    base = chain[-1]
    record = group.records[base]
    if record.legality == FAKE and (flat or base in group.own()):
        raise Illegal(f"the template {base} was not exported", path=export.name, hint="Export it first.")
    told = _told(token, progress)
    if flat:
        return collapse(token, export, image, target, ctime=ctime, progress=told)[0]
    if base not in group.own() and base not in target.entries():
        raise NotFound(f"the template {base} is not there", path=target.name, hint="Import it first.")
    if not new_ids:
        _refuse_present(target, image)
    return copy_image(
        token, export, image, target, ctime=ctime, target_image=make_id() if new_ids else None, progress=told
    )


# Streams


class Uploaded(NamedTuple):
    """A disk that was uploaded: bytes of the stream and their SHA-256 in hexadecimal."""

    image: str
    volume: str
    size: int
    sha256: str


def upload(
    token: SpmToken,
    domain: Domain,
    stream: Readable,
    size: int,
    *,
    ctime: int,
    content: Literal["raw", "qcow2"] = "raw",
    fmt: str = COW,
    kind: str = SPARSE,
    description: str = "",
    sha256: str | None = None,
    progress: Progress = _silent,
) -> Uploaded:
    """Make a disk of a stream of *size* bytes: what a guest reads, or a qcow2 file.

    The volume is ILLEGAL until size and checksum are right; a qcow2 file must
    stand alone (no backing or data file, no encryption) and be sound.
    Nothing is left of an upload that fails, nor, after recovery, of one that is cut.

    Raises: Illegal, IllegalSpec, UnsupportedVersion, FormatError, and what
    creation raises.
    """
    told = _told(token, progress)
    first = b"" if content == "raw" else read_piece(stream, PIECE)
    capacity = size if content == "raw" else _capacity_of(first, size, domain)
    if content == "qcow2":
        fmt, kind = COW, SPARSE
    spec = VolumeSpec(
        make_id(),
        make_id(),
        capacity,
        fmt,
        kind,
        description=description,
        initial_size=round_up(size, PAGE) if domain.block and fmt == COW and kind == SPARSE else None,
        legality=mv.ILLEGAL,
    )
    create_volume(token, domain, spec, ctime, note=arriving(spec.volume))
    try:
        with operation(token, domain, spec.volume):
            if content == "raw":
                done = _receive_raw(domain, spec, stream, size, sha256, told)
            else:
                done = _receive_file(domain, spec, stream, first, size, sha256, told)
            _give_back(token, domain, spec)
        domain.set_note(token, spec.volume, None)
    except BaseException:
        remove_volumes(token, domain, spec.image, [spec.volume], force=True)
        raise
    return Uploaded(spec.image, spec.volume, done.size, done.sha256)


def _capacity_of(first: bytes, size: int, domain: Domain) -> int:
    """Return the virtual size of the qcow2 file that begins with *first*, if it may be uploaded."""
    header = Header.parse(first, size, path="the stream")
    if header.backing_file is not None or header.has_data_file:
        raise Illegal("the image names other files", hint="Flatten it first.")
    if header.crypt_method:
        raise UnsupportedFeature("encrypted images have no place in a domain")
    if header.version > 2 and domain.metadata.version < 4:
        raise UnsupportedVersion(
            f"an image of version {header.version} needs a domain of V4", path=domain.name, hint="Convert it to 0.10."
        )
    if header.size % PAGE:
        raise Illegal(f"the image has {header.size} bytes, no multiple of {PAGE}", hint="Resize it first.")
    return header.size


def _receive_raw(
    domain: Domain, spec: VolumeSpec, stream: Readable, size: int, sha256: str | None, progress: Progress
) -> Received:
    with open_image(domain, spec.volume, writable=True, allow_illegal=True) as image:
        if domain.block and spec.format == RAW:
            # A logical volume holds old data, where zeros of the stream are not written.
            image.zero(image.size, 0)
        done = receive(stream, lambda data, at: image.pwrite(data, at), size=size, sha256=sha256, progress=progress)
        image.flush()
    return done


def _receive_file(
    domain: Domain,
    spec: VolumeSpec,
    stream: Readable,
    first: bytes,
    size: int,
    sha256: str | None,
    progress: Progress,
) -> Received:
    storage = domain.open_volume(spec.volume, writable=True)
    try:
        if domain.block:
            # What the stream leaves out must read as zero.
            storage.zero(0, min(storage.size, round_up(size, PAGE)))
            limit = storage.size
        else:
            storage.resize(0)
            limit = 1 << 62
        done = receive(
            stream,
            lambda data, at: storage.write(at, [data]),
            size=size,
            sha256=sha256,
            limit=limit,
            first=first,
            progress=progress,
        )
        if not domain.block:
            storage.resize(done.size)
        storage.flush()
        report = check(storage)
        if report.failure or report.corruptions or report.check_errors:
            raise Illegal("the uploaded image is damaged", path=domain.name)
    finally:
        storage.close()
    return done


def _give_back(token: SpmToken, domain: Domain, spec: VolumeSpec) -> None:
    if not domain.block or spec.format != COW or spec.type != SPARSE:
        return
    storage = domain.open_volume(spec.volume)
    try:
        end = check(storage).image_end_offset
    finally:
        storage.close()
    if end:
        domain.reduce(token, spec.volume, optimal_cow_size(end, spec.capacity, leaf=True))


def download(
    domain: Domain, image: str, sink: Writable, *, volume: str | None = None, progress: Progress = _silent
) -> Received:
    """Write what a guest reads of a disk, or of *volume* of it, to *sink*.

    Raises: Illegal for an ILLEGAL volume and a fake template, NotFound.
    """
    group = ImageGroup.load(domain, image)
    chain = group.chain(volume)
    for member in chain:
        if group.records[member].legality == FAKE:
            raise Illegal(f"the template {member} was not exported", path=domain.name)
    with open_image(domain, chain[0]) as opened:
        return send(opened, sink, progress=progress)
