# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Files of the special classes of domains: media of ISO domains, descriptions of machines on export domains.

Both are plain files in directories of fixed names, without record or lease.
Invariant: a file appears whole, by a rename, or not at all; a name is one
part of a path, printable, and never hides or leads elsewhere.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from typing import Final

from .errors import AlreadyExists, Illegal, InvalidName, NotFound, printable
from .file_domain import FileDomain
from .ids import ISO_IMAGE, check_id, is_id, make_id
from .metadata_domain import BACKUP, ISO
from .stream import Progress, Readable, Received, receive
from .token import SpmToken

__all__ = [
    "ISO_SUFFIXES",
    "list_media",
    "list_ovfs",
    "read_ovf",
    "remove_media",
    "remove_ovf",
    "upload_media",
    "write_ovf",
]

#: What a media name ends with, in any case; other files are not shown.
ISO_SUFFIXES: Final = (".iso", ".vfd")
_FOLDER: Final = f"images/{ISO_IMAGE}"
_PART: Final = ".part"
_MAX_NAME: Final = 200
#: The description of a machine is some tens of KiB of XML.
OVF_LIMIT: Final = 1 << 20


def _require(domain: FileDomain, domain_class: str, what: str) -> None:
    if domain.metadata.domain_class != domain_class:
        raise Illegal(
            f"{what} are on {domain_class} domains, this one is {domain.metadata.domain_class}", path=domain.name
        )


def _check_name(name: str) -> str:
    if (
        not name.lower().endswith(ISO_SUFFIXES)
        or name.startswith(".")
        or "/" in name
        or not name.isprintable()
        or len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME
    ):
        raise InvalidName(
            f"not the name of a medium: '{printable(name[:120])}'",
            hint="Names end with .iso or .vfd and hold no slash.",
        )
    return name


def list_media(domain: FileDomain, suffixes: Sequence[str] = ISO_SUFFIXES) -> dict[str, int]:
    """Return size by name of the media of an ISO domain, also in its folders; links are left out."""
    _require(domain, ISO, "media")
    found: dict[str, int] = {}
    todo = [("", 0)]
    while todo:
        folder, depth = todo.pop()
        for name in domain.root.names(f"{_FOLDER}{folder}"):
            path = f"{folder}/{name}"
            state = domain.root.stat(f"{_FOLDER}{path}")
            if stat.S_ISDIR(state.st_mode) and depth < 8:
                todo.append((path, depth + 1))
            elif stat.S_ISREG(state.st_mode) and name.lower().endswith(tuple(suffixes)):
                found[path[1:]] = state.st_size
    return dict(sorted(found.items()))


def upload_media(
    token: SpmToken,
    domain: FileDomain,
    name: str,
    stream: Readable,
    *,
    size: int | None = None,
    sha256: str | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Received:
    """Put a medium into an ISO domain; until it is complete nobody sees it.

    *size* and *sha256* are checked where given.

    Raises: InvalidName, AlreadyExists unless *replace*, Illegal when size or
    checksum differ, StorageError.
    """
    _require(domain, ISO, "media")
    path = f"{_FOLDER}/{_check_name(name)}"
    root = domain.root
    if root.exists(path) and not replace:
        raise AlreadyExists("a medium of this name is there", path=root.full(path))
    part = f"{_FOLDER}/{make_id()}{_PART}"
    token.check()
    root.create(part, mode=0o644)
    try:
        with root.open(part, writable=True) as storage:
            done = receive(
                stream, lambda data, at: storage.write(at, [data]), size=size, sha256=sha256, progress=progress
            )
            # Zeros at the end were not written.
            storage.resize(done.size)
            storage.flush()
        token.check()
        if replace:
            root.rename(part, path)
        else:
            # A link, unlike a rename, never takes the place of a file that came meanwhile.
            root.link(part, path)
    finally:
        root.unlink(part, missing_ok=True)
    return done


def remove_media(token: SpmToken, domain: FileDomain, name: str) -> None:
    """Remove a medium.  Raises: InvalidName, NotFound."""
    _require(domain, ISO, "media")
    token.check()
    domain.root.unlink(f"{_FOLDER}/{_check_name(name)}")


# Descriptions of machines


def _ovf_path(machine: str) -> str:
    check_id(machine, "machine UUID")
    return f"master/vms/{machine}/{machine}.ovf"


def list_ovfs(domain: FileDomain) -> list[str]:
    """Return the UUIDs of the machines and templates that an export domain describes."""
    _require(domain, BACKUP, "machines")
    names = filter(is_id, domain.root.names("master/vms"))
    return [name for name in names if domain.root.exists(_ovf_path(name))]


def read_ovf(domain: FileDomain, machine: str) -> bytes:
    """Return a description as it was written.  Raises: NotFound, MetadataError when it is too long."""
    _require(domain, BACKUP, "machines")
    return domain.root.read(_ovf_path(machine), limit=OVF_LIMIT)


def write_ovf(token: SpmToken, domain: FileDomain, machine: str, text: bytes) -> None:
    """Put or replace a description.  Raises: InvalidName when it is longer than 1 MiB."""
    _require(domain, BACKUP, "machines")
    path = _ovf_path(machine)
    if len(text) > OVF_LIMIT:
        raise InvalidName(f"the description has {len(text)} bytes, the limit is {OVF_LIMIT}")
    token.check()
    domain.root.make_directory(f"master/vms/{machine}", exist_ok=True)
    domain.root.replace(path, text)


def remove_ovf(token: SpmToken, domain: FileDomain, machine: str) -> None:
    """Remove a description.  Raises: NotFound."""
    _require(domain, BACKUP, "machines")
    if not domain.root.exists(_ovf_path(machine)):
        raise NotFound(f"no machine {machine} is described", path=domain.name)
    token.check()
    domain.root.remove_tree(f"master/vms/{machine}")
