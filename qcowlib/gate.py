# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The gate: which files an image may make us open.

An image can name a backing file and a data file.  The name is input from
whoever wrote the image, so it is opened only by a policy object.  Invariant:
whatever the policy, a name is never more than the name of a regular file or
block device; ``json:`` is accepted only where it says nothing else, and no
protocol name ever opens a device, a socket or the network (N2, N3).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from qcowlib.errors import GateDenied, UsageError, printable
from qcowlib.storage.file import FileStorage, open_beneath

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Literal, NamedTuple, Protocol

    from qcowlib.storage.base import Storage

    Kind = Literal["backing", "data-file"]
else:
    from qcowlib.records import NamedTuple

    Protocol = object

__all__ = [
    "FileName",
    "References",
    "deny_all",
    "directories",
    "name_of",
    "parse_name",
    "qemu_like",
    "resolve_name",
    "same_directory",
    "seen_from",
]


_MAX_JSON = 4096
_FILE_DRIVERS: Final = frozenset(("file", "host_device"))
_FORMATS: Final = frozenset(("qcow2", "raw", "luks"))


class FileName(NamedTuple):
    """What a stored name means: a path, and the format where the name tells it."""

    path: str
    format: str | None = None


class References(Protocol):
    """A policy. ``open`` returns a storage opened for *writable* access, or raises GateDenied."""

    def open(self, kind: Kind, name: str, owner: str, *, writable: bool, cache: str) -> Storage:
        """Open *name* (a path) as found in the image *owner* (a path too), for reading unless *writable*.

        *kind* tells what it is for; *cache* is the mode the image was opened with.
        Raises: GateDenied to refuse, or any error of opening.
        """


def parse_name(name: str, *, owner: str | None = None) -> FileName:
    """Return the path in a backing file name; ``json:`` may only name a file and its format.

    The path is as seen from the folder of the image *owner* that holds the
    name.  Source: qemu takes a relative path behind ``file:`` and in ``json:``
    from the working directory.
    Raises: GateDenied for a protocol or any other option.
    """
    if name.startswith("json:"):
        found = _parse_json(name, owner)
        return found._replace(path=seen_from(owner, found.path))
    if name.startswith("file:"):
        path = name[5:]
        # Source: so that what is left is not taken for a protocol either.
        return FileName(seen_from(owner, f"./{path}" if ":" in path.partition("/")[0] else path))
    head, colon, _ = name.partition(":")
    if colon and "/" not in head:
        raise GateDenied(f"'{printable(name)}' names a protocol, not a file", path=owner)
    return FileName(name)


def name_of(policy: References, name: str, owner: str) -> FileName:
    """Return what *name* means to *policy*, which may have a ``parse_name`` of its own.  Raises: GateDenied."""
    parse: Callable[..., FileName] = getattr(policy, "parse_name", parse_name)
    return parse(name, owner=owner)


def seen_from(owner: str | None, path: str) -> str:
    """Return *path*, relative to the working directory, as seen from the folder of *owner*."""
    home = os.path.dirname(owner or "")
    if not home or not path or path.startswith("/") or os.path.realpath(home) == os.path.realpath(os.curdir):
        return path
    return os.path.abspath(path)  # noqa: PTH100


def _parse_json(name: str, owner: str | None) -> FileName:
    refused = GateDenied("the json: name says more than which file it is", path=owner)
    # Names are short; the bound also keeps the parser from deep nesting.
    if len(name) > _MAX_JSON or name.count("{") > 4 or "[" in name:
        raise refused
    import json

    try:
        tree = json.loads(name[5:])
    except (ValueError, RecursionError) as error:
        raise GateDenied("the json: name cannot be parsed", path=owner) from error
    if not isinstance(tree, dict):
        raise refused
    flat: dict[str, object] = {}
    stack: list[tuple[str, object]] = [("", tree)]
    while stack:
        prefix, value = stack.pop()
        if isinstance(value, dict):
            stack.extend((f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items())
        elif prefix in flat:
            raise refused
        else:
            flat[prefix] = value
    driver = flat.pop("driver", None)
    if driver in _FILE_DRIVERS:
        path, fmt = flat.pop("filename", None), None
    else:
        fmt = driver
        path = flat.pop("file.filename", None)
        if flat.pop("file.driver", "file") not in _FILE_DRIVERS:
            raise refused
    if flat or not isinstance(path, str) or not (fmt is None or (isinstance(fmt, str) and fmt in _FORMATS)):
        raise refused
    return FileName(path, fmt)


def resolve_name(kind: Kind, path: str, owner: str) -> str:
    """Return *path* as seen from the current directory.

    Source: qemu takes a relative backing name from the folder of the image
    that holds it, a relative data file name from the working directory.
    """
    if kind == "data-file" or path.startswith("/"):
        return path
    return os.path.join(os.path.dirname(owner), path)


class _DenyAll:
    def open(self, kind: Kind, name: str, owner: str, *, writable: bool, cache: str) -> FileStorage:
        what = "backing file" if kind == "backing" else "data file"
        raise GateDenied(f"the image names a {what} ('{printable(name)}'), which the policy forbids", path=owner)


class _QemuLike:
    def open(self, kind: Kind, name: str, owner: str, *, writable: bool, cache: str) -> FileStorage:
        return FileStorage.open(resolve_name(kind, name, owner), writable=writable, cache=cache)


class _Beneath:
    """Names that stay inside a folder: the owner's own, or one of a list."""

    def __init__(self, folders: tuple[str, ...] | None) -> None:
        self._folders = folders

    def open(self, kind: Kind, name: str, owner: str, *, writable: bool, cache: str) -> FileStorage:
        home = os.path.dirname(os.path.abspath(owner))  # noqa: PTH100
        if self._folders is None:
            if name.startswith("/"):
                raise GateDenied(f"'{printable(name)}' is not a name inside the image's folder", path=owner)
            return self._open(home, name, writable, cache)
        wanted = os.path.normpath(os.path.join(home, name))
        for folder in self._folders:
            if wanted.startswith(folder.rstrip("/") + "/"):
                return self._open(folder, wanted[len(folder.rstrip("/")) + 1 :], writable, cache)
        raise GateDenied(f"'{printable(name)}' lies outside the allowed folders", path=owner)

    def _open(self, folder: str, relative: str, writable: bool, cache: str) -> FileStorage:
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = open_beneath(folder_fd, relative, writable=writable)
        finally:
            os.close(folder_fd)
        return FileStorage(fd, os.path.join(folder, relative), cache=cache)


deny_all: Final[References] = _DenyAll()
"""Open nothing that an image names: for images from strangers."""

qemu_like: Final[References] = _QemuLike()
"""Open any file that qemu-img would, but no protocol."""


def same_directory() -> References:
    """Allow plain relative names inside the folder of the image that holds them, through no link."""
    return _Beneath(None)


def directories(folders: Iterable[str | os.PathLike[str]]) -> References:
    """Allow names that lead inside one of *folders* (given, not followed), through no link."""
    absolute = tuple(os.path.abspath(os.fspath(folder)) for folder in folders)  # noqa: PTH100
    if not absolute:
        raise UsageError("at least one folder is needed; to open nothing use deny_all")
    return _Beneath(absolute)
