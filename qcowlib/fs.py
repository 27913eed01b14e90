# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Images as an fsspec file system: ``qcow2://disk::https://host/image.qcow2``.

Invariant: only what is read is fetched, in ranges, and never more than
*cache_bytes* of it is kept; what an image names is looked for beside it, in
the same folder of the same target, or not at all; nothing is ever written.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import posixpath
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol

import fsspec
from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from qcowlib.errors import Error, FormatError, GateDenied, ReadOnly, StorageError, UsageError, printable
from qcowlib.gate import References, deny_all, same_directory
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.runtime import new_condition
from qcowlib.storage.base import Storage
from qcowlib.storage.reader import ReaderStorage
from qcowlib.units import KiB, MiB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qcowlib.gate import Kind
    from qcowlib.opening import Secrets

    class Target(Protocol):
        """What is used of the file system below."""

        def info(self, path: str) -> Mapping[str, object]: ...

        def cat_file(self, path: str, start: int, end: int) -> bytes: ...


__all__ = ["Qcow2FileSystem", "RangeReader"]

BLOCK: Final = 256 * KiB
CACHE: Final = 64 * MiB
_AT_ONCE: Final = 4
"""Reads of as many blocks go past the cache: they are data, and one request already."""
_BUFFER: Final = 1 * MiB
_DISK: Final = "disk"
_SNAPSHOTS: Final = "snapshots"


class RangeReader:
    """The bytes of *path* in *target* by positioned reads, through a cache of blocks.

    Any number of threads may use it.  Raises: StorageError, also where the
    target does not serve ranges or does not tell a size.
    """

    def __init__(self, target: Target, path: str, *, block: int = BLOCK, cache: int = CACHE) -> None:
        if block < 512 or cache < block:
            raise UsageError("a block has at least 512 bytes, and the cache a block", path=path)
        self.name = path
        self._target = target
        self._block = block
        self._room = cache // block
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = new_condition()
        try:
            size = target.info(path).get("size")
        except Exception as error:
            raise self._failure(error, "open") from error
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise StorageError(errno.EIO, path=path, operation="open", message="the target does not tell its size")
        self.size = size

    def _failure(self, error: Exception, operation: str, offset: int | None = None) -> Error:
        # Targets raise whatever their libraries do; a number of the system is kept where there is one.
        code = error.errno if isinstance(error, OSError) and error.errno else None
        if isinstance(error, FileNotFoundError):
            code = errno.ENOENT
        text = printable(str(error) or type(error).__name__)[:500] if code is None else None
        if operation == "open":
            # The name also where an image names this file, and the error is that image's.
            text = f"could not open {printable(self.name)}: {text or os.strerror(code or errno.EIO)}"
        return StorageError(code or errno.EIO, path=self.name, operation=operation, offset=offset, message=text)

    def _fetch(self, start: int, end: int) -> bytes:
        try:
            data = self._target.cat_file(self.name, start, end)
        except Exception as error:
            raise self._failure(error, "read", start) from error
        if len(data) != end - start:
            text = f"the target answered {len(data)} bytes where {end - start} were asked; does it serve ranges?"
            raise StorageError(errno.EIO, path=self.name, operation="read", offset=start, message=text)
        return data

    def pread(self, length: int, offset: int, /) -> bytes:
        """Return *length* bytes from *offset*, fewer at the end."""
        end = min(offset + length, self.size)
        if offset < 0 or end <= offset:
            return b""
        if end - offset >= _AT_ONCE * self._block:
            return self._fetch(offset, end)
        first, last = offset // self._block, (end - 1) // self._block
        found = self._cached(first, last)
        for start, stop in _gaps(found, first, last):
            data = self._fetch(start * self._block, min((stop + 1) * self._block, self.size))
            for number in range(start, stop + 1):
                at = (number - start) * self._block
                found[number] = data[at : at + self._block]
        self._keep(found)
        whole = b"".join(found[number] for number in range(first, last + 1))
        base = first * self._block
        return whole[offset - base : end - base]

    def _cached(self, first: int, last: int) -> dict[int, bytes]:
        with self._lock:
            return {number: self._blocks[number] for number in range(first, last + 1) if number in self._blocks}

    def _keep(self, blocks: Mapping[int, bytes]) -> None:
        with self._lock:
            for number, data in blocks.items():
                self._blocks[number] = data
                self._blocks.move_to_end(number)
            while len(self._blocks) > self._room:
                self._blocks.popitem(last=False)


def _gaps(found: Mapping[int, bytes], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of numbers that are missing, as first and last."""
    start: int | None = None
    for number in range(first, last + 2):
        missing = number <= last and number not in found
        if missing and start is None:
            start = number
        elif not missing and start is not None:
            yield start, number - 1
            start = None


class _Beside:
    """The policy for a target that is not this machine's: plain names in the folder of the image."""

    def __init__(self, target: Target, path: str, block: int, cache: int) -> None:
        self._target = target
        self._seen = {path}
        self._sizes = block, cache

    def open(self, kind: Kind, name: str, owner: str, *, writable: bool, cache: str) -> Storage:
        parts = name.split("/")
        # A server may decode what looks harmless here.
        if any(part in ("", ".", "..") for part in parts) or any(c in "%?#\\" or not c.isprintable() for c in name):
            raise GateDenied(f"'{printable(name)}' is not a plain name beside the image", path=owner)
        folder = posixpath.dirname(owner.partition("?")[0])
        path = posixpath.join(folder, name)
        if path in self._seen:
            raise FormatError(f"'{printable(name)}' creates an infinite loop", path=owner)
        self._seen.add(path)
        block, room = self._sizes
        return ReaderStorage(RangeReader(self._target, path, block=block, cache=room), name=path)


class Qcow2FileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The guest's disk of an image, as the file ``disk``, and its snapshots, as ``snapshots/NAME``.

    *fo* names the image, for any file system that fsspec knows: give
    *target_protocol* and *target_options*, or a whole URL, or chain them
    (``qcow2://disk::s3://bucket/image.qcow2``).  *format* and *secret* as for
    :func:`qcowlib.open`.  *references* is ``"folder"`` (backing and data files
    beside the image, by plain names) or ``"none"``.  *block_bytes* is what one
    request for little fetches, *cache_bytes* what is kept of each file of the chain.

    Snapshots that have the name of another one, or one with a slash, are found by their id.

    Raises: any :class:`qcowlib.Error`; FileNotFoundError for other names.
    """

    protocol = "qcow2"
    root_marker = ""
    cachable = False

    def __init__(
        self,
        fo: str = "",
        *,
        target_protocol: str | None = None,
        target_options: Mapping[str, object] | None = None,
        format: str | None = None,
        secret: Secrets | None = None,
        references: str = "folder",
        block_bytes: int = BLOCK,
        cache_bytes: int = CACHE,
        **storage_options: object,
    ) -> None:
        self._images: dict[str | None, Image] = {}
        super().__init__(**storage_options)
        if not fo:
            raise UsageError("name the image: fo=..., or qcow2://disk::PROTOCOL://...")
        if references not in ("folder", "none"):
            raise UsageError(f"references must be 'folder' or 'none', not '{printable(references)}'")
        options = dict(target_options or {})
        if target_protocol is None:
            self._target, self._path = url_to_fs(fo, **options)
        else:
            self._target = fsspec.filesystem(target_protocol, **options)
            self._path = self._target._strip_protocol(fo)
        protocols = self._target.protocol
        self._local = "file" in ((protocols,) if isinstance(protocols, str) else protocols)
        self._allow = references == "folder"
        self._format, self._secret = format, secret
        self._sizes = block_bytes, cache_bytes
        self._reader: RangeReader | None = None
        self._names: dict[str, str] | None = None

    def _image(self, snapshot: str | None = None) -> Image:
        """The open image, at *snapshot* (an id)."""
        image = self._images.get(snapshot)
        if image is not None:
            return image
        source: str | Storage = self._path
        references: References = same_directory() if self._allow else deny_all
        if not self._local:
            block, room = self._sizes
            if self._reader is None:
                self._reader = RangeReader(self._target, self._path, block=block, cache=room)
            source = ReaderStorage(self._reader, name=self._path)
            if self._allow:
                references = _Beside(self._target, self._path, block, room)
        image = open_image(source, format=self._format, snapshot=snapshot, references=references, secret=self._secret)
        self._images[snapshot] = image
        return image

    def _snapshots(self) -> dict[str, str]:
        """The ids of the snapshots by the names that they have here."""
        if self._names is None:
            names: dict[str, str] = {}
            for snapshot in self._image().snapshots():
                plain = snapshot.name and "/" not in snapshot.name and snapshot.name not in names
                names[snapshot.name if plain else snapshot.id] = snapshot.id
            self._names = names
        return self._names

    def _find(self, path: str) -> Image:
        name = self._strip_protocol(path)
        if name == _DISK:
            return self._image()
        folder, _, snapshot = name.partition("/")
        if folder != _SNAPSHOTS or snapshot not in self._snapshots():
            raise FileNotFoundError(errno.ENOENT, "no such file in the image", path)
        return self._image(self._snapshots()[snapshot])

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path)).strip("/")

    # -- what fsspec asks for --------------------------------------------------------

    def info(self, path: str, **_: object) -> dict[str, object]:
        """Return name, size and type of one entry."""
        name = self._strip_protocol(path)
        if name in ("", _SNAPSHOTS):
            return {"name": name, "size": 0, "type": "directory"}
        return {"name": name, "size": self._find(name).size, "type": "file"}

    def ls(self, path: str, detail: bool = True, **_: object) -> list[dict[str, object]] | list[str]:
        """List a folder, or one file."""
        name = self._strip_protocol(path)
        if name == "":
            names = [_DISK, *([_SNAPSHOTS] if self._snapshots() else [])]
        elif name == _SNAPSHOTS:
            names = [f"{_SNAPSHOTS}/{snapshot}" for snapshot in self._snapshots()]
        else:
            self._find(name)
            names = [name]
        return [self.info(entry) for entry in names] if detail else names

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
        """Return bytes *start* to *end*, counted from the end where negative."""
        image = self._find(path)
        first, stop, _step = slice(start, end).indices(image.size)
        return image.pread(max(stop - first, 0), first)

    def _open(self, path: str, mode: str = "rb", **_: object) -> io.BufferedReader:
        if mode != "rb":
            raise ReadOnly("an image is opened for reading here", path=path)
        return io.BufferedReader(self._find(path).file(), _BUFFER)

    def close(self) -> None:
        """Close every file of this machine that is open; what was opened here cannot be read any more."""
        images, self._images = self._images, {}
        for image in images.values():
            image.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


fsspec.register_implementation("qcow2", Qcow2FileSystem, clobber=True)
