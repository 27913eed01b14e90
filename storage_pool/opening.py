# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Images of volumes: opening one with the chain below, and naming what it stands on.

Invariant: nothing outside the domain is opened, whatever an image names, and
a chain is opened only when records and images say the same of it.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Final

import qcowlib
from qcowlib.errors import GateDenied, printable
from qcowlib.qcow2.directories import read_header
from qcowlib.qcow2.header_update import set_backing

from . import metadata_volume as mv
from .domain import Domain
from .errors import Illegal, MetadataError
from .ids import BLANK, is_id
from .metadata_volume import COW, RAW, SHARED, VolumeMetadata

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

    from .token import SpmToken

__all__ = ["IMAGE_FORMATS", "DomainReferences", "backing_of", "open_image", "set_parent_name", "volume_of_name"]

#: The format of an image file by the format of its volume.
IMAGE_FORMATS: Final = {COW: "qcow2", RAW: "raw"}


class DomainReferences:
    """Opens the backing volumes that images of a domain name.

    A name is the UUID of a volume of the domain, alone or behind
    ``../<image>/``, as two generations of hosts wrote it; its directory part
    is not used.  Anything else is refused; so are, unless *allow_illegal*, an
    ILLEGAL volume and one that is not what the records say, from *top* on:
    of two accounts of a chain neither is believed.
    """

    __slots__ = ("_allow_illegal", "_domain", "_top")

    def __init__(self, domain: Domain, top: VolumeMetadata | None = None, *, allow_illegal: bool = False) -> None:
        self._domain = domain
        self._allow_illegal = allow_illegal
        self._top = top

    def open(self, kind: str, name: str, owner: str, *, writable: bool, cache: str) -> Storage:
        """See :class:`qcowlib.gate.References`."""
        volume = volume_of_name(name)
        if kind != "backing" or volume is None:
            raise GateDenied(f"'{printable(name[:120])}' is not the name of a volume", path=owner)
        if not self._allow_illegal:
            record = self._domain.record(volume)
            if record.legality == mv.ILLEGAL:
                raise Illegal(f"the volume {volume} is ILLEGAL", path=self._domain.name)
            self._compare(volume)
            self._top = record
        return self._domain.open_volume(volume, writable=writable)

    def _compare(self, volume: str) -> None:
        if self._top is not None and self._top.parent != volume:
            text = f"an image stands on {volume}, its record says {self._top.parent}"
            raise MetadataError(text, path=self._domain.name, hint="Check the domain.")

    def end(self) -> None:
        """Say that the last image names no other.  Raises: MetadataError when its record does."""
        if not self._allow_illegal:
            self._compare(BLANK)


def backing_of(storage: Storage) -> tuple[str | None, str | None]:
    """Return the backing name and format that a qcow2 image stores.  Raises: FormatError."""
    header = read_header(storage)
    name = header.backing_file.decode("utf-8", "surrogateescape") if header.backing_file else None
    fmt = header.backing_format.decode("utf-8", "replace") if header.backing_format else None
    return name, fmt


def volume_of_name(name: str) -> str | None:
    """Return the volume that a stored backing name means, ``None`` when it means none."""
    parts = name.split("/")
    if not is_id(parts[-1]) or any(not (is_id(part) or part in ("..", "images")) for part in parts[:-1]):
        return None
    return parts[-1]


def open_image(
    domain: Domain, volume: str, *, writable: bool = False, allow_illegal: bool = False, backing: bool = True
) -> qcowlib.Image:
    """Open a volume's image with the chain below it.

    Raises: NotFound, Illegal for an ILLEGAL volume in the chain unless allowed and for
    writing to a template, MetadataError where records and images have
    another chain each (unless *allow_illegal*), and what :func:`qcowlib.open` raises.
    """
    record = domain.record(volume)
    if record.legality == mv.ILLEGAL and not allow_illegal:
        raise Illegal(f"the volume {volume} is ILLEGAL", path=domain.name)
    if writable and record.voltype == SHARED:
        raise Illegal(f"the volume {volume} is a template", path=domain.name)
    references = DomainReferences(domain, record, allow_illegal=allow_illegal)
    storage = domain.open_volume(volume, writable=writable)
    try:
        image = qcowlib.open(
            storage,
            "r+" if writable else "r",
            format=IMAGE_FORMATS.get(record.format, "raw"),
            references=references,
            backing=backing,
        )
    except BaseException:
        storage.close()
        raise
    try:
        if backing:
            references.end()
    except BaseException:
        image.close()
        raise
    return image


def set_parent_name(token: SpmToken, domain: Domain, child: str, parent: str, parent_format: str) -> None:
    """Let the image of *child* name *parent*, and its format; its record is not changed."""
    role = domain.record(child).voltype
    locked = domain.metadata.version < 3 and role != mv.LEAF
    if locked:
        domain.set_writable(token, [child], True)
    with closing(domain.open_volume(child, writable=True)) as storage:
        token.check()
        set_backing(storage, parent.encode(), IMAGE_FORMATS[parent_format].encode())
        storage.flush()
    if locked:
        domain.set_writable(token, [child], False)
