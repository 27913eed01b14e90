# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Images as an fsspec file system: ``qcow2://disk::https://host/image.qcow2``.

Invariant: only what is read is fetched, in ranges, and never more than
*cache_bytes* of it is kept, however many files a chain has; bytes of two states
of one file are never put together; what an image names is looked for beside it, in
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
    from collections.abc import Callable, Iterator

    from qcowlib.gate import Kind
    from qcowlib.opening import Secrets

    class Target(Protocol):
        """What is used of the file system below."""

        def info(self, path: str) -> Mapping[str, object]: ...

        def cat_file(self, path: str, start: int, end: int) -> bytes: ...


__all__ = ["BlockCache", "Qcow2FileSystem", "RangeReader"]

BLOCK: Final = 256 * KiB
CACHE: Final = 64 * MiB
_AT_ONCE: Final = 4
"""Reads of as many blocks go past the cache: they are data, and one request already."""
_BUFFER: Final = 1 * MiB
#: Without hyphens and in small letters: of HTTP, S3, GCS, Azure, local files, memory, archives.
_TELLING: Final = frozenset(
    (
        "size",
        *("etag", "contentmd5", "contentsettings", "digest", "md5", "md5hash", "crc", "crc32c", "checksum", "sha256"),
        *("lastmodified", "last_modified", "mtime", "modified", "updated", "created", "date_time"),
        *("generation", "metageneration", "versionid", "version_id", "ino"),
    )
)
_DISK: Final = "disk"
_SNAPSHOTS: Final = "snapshots"


class BlockCache:
    """Blocks of any number of files, at most *room* bytes of them; the ones last used stay."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._held = 0
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = new_condition()

    @property
    def held(self) -> int:
        """Bytes that are kept."""
        return self._held

    def find(self, name: str, numbers: range) -> dict[int, bytes]:
        """Return those of the blocks *numbers* that are here."""
        with self._lock:
            return {number: self._blocks[name, number] for number in numbers if (name, number) in self._blocks}

    def keep(self, name: str, blocks: Mapping[int, bytes]) -> None:
        """Keep *blocks*, and drop others for them."""
        with self._lock:
            for number, data in blocks.items():
                self._held += len(data) - len(self._blocks.pop((name, number), b""))
                self._blocks[name, number] = data
            while self._held > self._room:
                self._held -= len(self._blocks.popitem(last=False)[1])


class RangeReader:
    """The bytes of *path* in *target* by positioned reads, through a cache of blocks, which several may share.

    After each fetch the target is asked whether the file is still the same, by all that it tells of it: size,
    ETag, times, checksums, generation.  Once it is another one, every read fails: what was read
    before and what would be read now do not belong together.  *check_changes* false trusts that nobody writes.

    Any number of threads may use it.  Raises: StorageError, also where the target
    does not serve ranges or does not tell a size, and with ESTALE where the file changed.
    """

    def __init__(
        self,
        target: Target,
        path: str,
        *,
        block: int = BLOCK,
        cache: int | BlockCache = CACHE,
        check_changes: bool = True,
    ) -> None:
        if block < 512 or (isinstance(cache, int) and cache < block):
            raise UsageError("a block has at least 512 bytes, and the cache a block", path=path)
        self.name = path
        self._target = target
        self._block = block
        self._cache = BlockCache(cache) if isinstance(cache, int) else cache
        self._check = check_changes
        self._changed = False
        info = self._info("open")
        size = info.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise StorageError(errno.EIO, path=path, operation="open", message="the target does not tell its size")
        if info.get("partial") is False:
            raise StorageError(errno.EIO, path=path, operation="open", message="the target does not serve ranges")
        self.size = size
        self._identity = _identity(info)

    def _info(self, operation: str, offset: int | None = None) -> Mapping[str, object]:
        # What a listing said before is not what is there now.
        forget = getattr(self._target, "invalidate_cache", None)
        try:
            if forget is not None:
                forget(self.name)
            return self._target.info(self.name)
        except Exception as error:
            raise self._failure(error, operation, offset) from error

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
        self._refuse_changed(start)
        failed: Exception | None = None
        data = b""
        try:
            data = self._target.cat_file(self.name, start, end)
        except Exception as error:
            failed = error
        # Also where it failed: a file that shrank has no such range, and that it changed says more.
        if self._check and _identity(self._info("read", start)) != self._identity:
            self._changed = True
            self._refuse_changed(start)
        if failed is not None:
            raise self._failure(failed, "read", start) from failed
        if len(data) != end - start:
            text = f"the target answered {len(data)} bytes where {end - start} were asked; does it serve ranges?"
            raise StorageError(errno.EIO, path=self.name, operation="read", offset=start, message=text)
        return data

    def _refuse_changed(self, offset: int) -> None:
        if self._changed:
            text = "the file changed since it was opened; open it anew"
            raise StorageError(errno.ESTALE, path=self.name, operation="read", offset=offset, message=text)

    def pread(self, length: int, offset: int, /) -> bytes:
        """Return *length* bytes from *offset*, fewer at the end."""
        end = min(offset + length, self.size)
        if offset < 0 or end <= offset:
            return b""
        if end - offset >= _AT_ONCE * self._block:
            return self._fetch(offset, end)
        first, last = offset // self._block, (end - 1) // self._block
        self._refuse_changed(offset)
        found = self._cache.find(self.name, range(first, last + 1))
        for start, stop in _gaps(found, first, last):
            data = self._fetch(start * self._block, min((stop + 1) * self._block, self.size))
            for number in range(start, stop + 1):
                at = (number - start) * self._block
                found[number] = data[at : at + self._block]
        self._cache.keep(self.name, found)
        whole = b"".join(found[number] for number in range(first, last + 1))
        base = first * self._block
        return whole[offset - base : end - base]


def _identity(info: Mapping[str, object]) -> tuple[str, ...]:
    """All that tells one state of a file from another; targets have their own names for these."""
    return tuple(f"{name}={value}" for name, value in sorted(info.items()) if name.replace("-", "").lower() in _TELLING)


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

    def __init__(self, path: str, reader: Callable[[str], RangeReader]) -> None:
        self._reader = reader
        self._seen = {path}

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
        return ReaderStorage(self._reader(path), name=path)


class Qcow2FileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The guest's disk of an image, as the file ``disk``, and its snapshots, as ``snapshots/NAME``.

    *fo* names the image, for any file system that fsspec knows: give
    *target_protocol* and *target_options*, or a whole URL, or chain them
    (``qcow2://disk::s3://bucket/image.qcow2``).  *format* and *secret* as for
    :func:`qcowlib.open`.  *references* is ``"folder"`` (backing and data files
    beside the image, by plain names) or ``"none"``.  *block_bytes* is what one
    request for little fetches, *cache_bytes* what is kept of all files of the chain.
    *check_changes* is that of :class:`RangeReader`: a file that changes ends reading with ESTALE.

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
        check_changes: bool = True,
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
        if block_bytes < 512 or cache_bytes < block_bytes:
            raise UsageError("a block has at least 512 bytes, and the cache a block", path=self._path)
        self._block, self._cache, self._check = block_bytes, BlockCache(cache_bytes), check_changes
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
            if self._reader is None:
                self._reader = self._read(self._path)
            source = ReaderStorage(self._reader, name=self._path)
            if self._allow:
                references = _Beside(self._path, self._read)
        image = open_image(source, format=self._format, snapshot=snapshot, references=references, secret=self._secret)
        self._images[snapshot] = image
        return image

    def _read(self, path: str) -> RangeReader:
        return RangeReader(self._target, path, block=self._block, cache=self._cache, check_changes=self._check)

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
