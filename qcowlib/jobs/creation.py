# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""New files for new images: options by keyword, locks, and cleaning up.

Invariants: nothing is opened or changed before the options are known to be
right; an image that somebody uses is not overwritten; what was begun and
failed is removed.  A backing name is stored as given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from qcowlib.errors import Error, FormatError, UsageError, printable
from qcowlib.gate import References, parse_name, qemu_like, resolve_name
from qcowlib.ondisk import COMPRESSION_ZLIB, COMPRESSION_ZSTD
from qcowlib.qcow2.create import CreateOptions, Encryption, create_raw, new_header
from qcowlib.qcow2.create import create as create_qcow2
from qcowlib.storage.file import FileStorage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qcowlib.image import CacheMode
    from qcowlib.qcow2.create import Preallocation
    from qcowlib.storage.base import Storage

__all__ = ["Format", "NewOptions", "create", "file_options", "new_data_file", "new_storage", "open_backing"]

Format = Literal["qcow2", "raw"]

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_COMPRESSION = {"zlib": COMPRESSION_ZLIB, "zstd": COMPRESSION_ZSTD}
_PREALLOCATION = ("off", "metadata", "falloc", "full")


class NewOptions(TypedDict, total=False):
    """Creation options, named and meant as qemu-img's ``-o``; all but ``preallocation`` are for qcow2."""

    cluster_size: int
    compat: str
    compression_type: str
    data_file: str
    data_file_raw: bool
    encrypt: Encryption
    extended_l2: bool
    lazy_refcounts: bool
    preallocation: Preallocation
    refcount_bits: int


def file_options(
    options: Mapping[str, object], size: int, *, backing: str | None = None, backing_format: str | None = None
) -> CreateOptions:
    """Return *options* (of :class:`NewOptions`) as the format's own.

    Raises: UsageError with qemu's words.
    """
    unknown = options.keys() - NewOptions.__annotations__.keys()
    if unknown:
        raise UsageError(f"Invalid parameter '{printable(min(unknown))}'")
    given = cast("NewOptions", options)
    compat = given.get("compat", "1.1")
    compression = given.get("compression_type", "zlib")
    preallocation = given.get("preallocation", "off")
    data_file = given.get("data_file")
    for name, value, allowed in (
        ("version", compat, _VERSIONS),
        ("compression-type", compression, _COMPRESSION),
        ("preallocation", preallocation, _PREALLOCATION),
    ):
        if value not in allowed:
            raise UsageError(f"Parameter '{name}' does not accept value '{printable(str(value))}'")
    return CreateOptions(
        size=size,
        version=_VERSIONS[compat],
        cluster_size=given.get("cluster_size", 65536),
        refcount_bits=given.get("refcount_bits", 16),
        extended_l2=given.get("extended_l2", False),
        lazy_refcounts=given.get("lazy_refcounts", False),
        compression_type=_COMPRESSION[compression],
        preallocation=preallocation,
        backing_file=None if backing is None else os.fsencode(backing),
        backing_format=None if backing_format is None else os.fsencode(backing_format),
        data_file=None if data_file is None else os.fsencode(data_file),
        data_file_raw=given.get("data_file_raw", False),
        encrypt=given.get("encrypt"),
    )


@contextmanager
def new_storage(target: str | bytes | os.PathLike[str] | Storage, cache: CacheMode) -> Iterator[Storage]:
    """Give an empty storage for a new image: the file *target*, or a storage, which the caller keeps.

    A file is locked, closed at the end, and removed if the block fails.
    Raises: StorageError, Busy.
    """
    if not isinstance(target, str | bytes | os.PathLike):
        yield target
        return
    from qcowlib.storage.imagelock import lock_image

    storage = FileStorage.create(target, cache=cache)
    begun = False
    try:
        lock_image(storage.fileno(), storage.name, "create")
        begun = not storage.is_block
        # Cutting an empty file would make ext4 write out everything when it is closed.
        if begun and storage.size:
            storage.resize(0)
            # What ext4 remembers of that ends with the next close: better of this descriptor than of a full file.
            with suppress(OSError):
                os.close(os.open(f"/proc/self/fd/{storage.fileno()}", os.O_RDONLY))
        yield storage
    except BaseException:
        if begun:
            _remove(storage)
        storage.close()
        raise
    storage.close()


def _remove(storage: FileStorage) -> None:
    """Remove the file that the storage still is, not what took its name meanwhile."""
    try:
        status = os.stat(storage.name)  # noqa: PTH116
        if (status.st_dev, status.st_ino) == storage.identity:
            os.unlink(storage.name)  # noqa: PTH108
    except OSError:
        pass


@contextmanager
def new_data_file(name: str | None, cache: CacheMode) -> Iterator[Storage | None]:
    """Give the storage of a new external data file, if there is to be one."""
    if name is None:
        yield None
    else:
        with new_storage(name, cache) as storage:
            yield storage


def open_backing(
    name: str, format: str | None, owner: str, references: References, *, cache: CacheMode = "writeback"
) -> int:
    """Return the size of the image that a new image *owner* is to stand on; it can be opened, then.

    Raises: UsageError without a format, any error of opening it.
    """
    if not name:
        raise UsageError("Expected backing file name, got empty string")
    parsed = parse_name(name, owner=owner)
    path = resolve_name("backing", parsed.path, owner)
    if _same_file(path, owner):
        raise UsageError("Error: Trying to create an image with the same filename as the backing file", path=owner)
    # Not at the top: a new image without a backing file needs no engine, and starts in half the time.
    from qcowlib.image import open as open_image

    try:
        with open_image(path, format=format or parsed.format, references=references, cache=cache) as image:
            size, found = image.size, image.format
    except Error as error:
        error.hint = error.hint or "Could not open backing image."
        raise
    if format is None and parsed.format is None:
        raise FormatError(
            "Backing file specified without backing format", path=owner, hint=f"Detected format of {found}."
        )
    return size


def _same_file(a: str, b: str) -> bool:
    return os.path.abspath(a) == os.path.abspath(b)  # noqa: PTH100


def create(
    path: str | bytes | os.PathLike[str] | Storage,
    size: int | None,
    *,
    format: Format = "qcow2",
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    check_backing: bool = True,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    **options: object,
) -> None:
    """Create an image of *size* bytes; ``None`` takes the size of the backing file.

    *options* are those of :class:`NewOptions`.  The backing name is stored as
    given; unless *check_backing* is false the file must be there and open.
    The file at *path* is replaced; if that fails it is removed.

    Raises: UsageError, before anything is changed; Busy when somebody uses
    the file; StorageError.
    """
    if format not in ("qcow2", "raw"):
        raise UsageError(f"Unknown file format '{printable(format)}'")
    name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else path.name
    base = None if backing is None else os.fspath(backing)
    if format == "raw" and base is not None:
        raise UsageError("Backing file not supported for file format 'raw'", path=name)
    if base is not None and (check_backing or size is None):
        found = open_backing(base, backing_format, name, references)
        size = found if size is None else size
    if size is None:
        raise UsageError("Image creation needs a size parameter", path=name)
    described = file_options(options, size, backing=base, backing_format=backing_format)
    if format == "raw":
        if options.keys() - {"preallocation"}:
            raise UsageError(f"Invalid parameter '{min(options.keys() - {'preallocation'})}'", path=name)
        with new_storage(path, cache) as storage:
            create_raw(storage, size, preallocation=described.preallocation)
        return
    new_header(described)
    data_name = None if described.data_file is None else os.fsdecode(described.data_file)
    with new_storage(path, cache) as storage, new_data_file(data_name, cache) as data:
        create_qcow2(storage, described, data=data)
