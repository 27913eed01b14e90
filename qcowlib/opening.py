# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Opening an image and the chain below it (blocking; any runtime may run the result).

Invariants: what is locked is what is read and used, one descriptor for all
(N5); an image that others may be writing is not opened, unless the caller says
``force_share``; nothing that an image names is opened before the policy said
so (N2).  On any error everything opened so far is closed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from qcowlib.chain import MAX_DEPTH, Chain, Layer, probe_format
from qcowlib.errors import CorruptImage, Error, FormatError, ReadOnly, SecretError, UsageError, printable
from qcowlib.gate import References, name_of, qemu_like
from qcowlib.ondisk import CRYPT_NONE, Header, SnapshotEntry
from qcowlib.qcow2.directories import read_header, read_snapshots
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.qcow2.tables import CACHE_BYTES, MIN_CACHE_BYTES
from qcowlib.raw import RawImage
from qcowlib.storage.file import FileStorage
from qcowlib.units import MiB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple

    from qcowlib.crypto import Secret
    from qcowlib.qcow2.read import Cipher
    from qcowlib.runtime import Runtime
    from qcowlib.storage.base import Storage
    from qcowlib.storage.reader import PositionedReader, SeekableReader

    Passphrase = Secret | str | bytes
    Secrets = Passphrase | Mapping[str, Passphrase] | Sequence[Passphrase | None]
    Source = str | bytes | os.PathLike[str] | int | Storage | PositionedReader | SeekableReader
else:
    from qcowlib.records import NamedTuple

__all__ = ["FORMATS", "OpenOptions", "open_chain", "open_storage", "secrets_below"]

#: ``luks``: the raw image inside a LUKS file, which is never found by probing.
FORMATS = ("qcow2", "raw", "luks")
_MAX_LUKS_AREA = 16 * MiB
_WRITE_THROUGH = {"writethrough": "writeback", "directsync": "none"}


class OpenOptions(NamedTuple):
    """How to open; see :func:`qcowlib.open` for the meaning of each."""

    writable: bool = False
    format: str | None = None
    snapshot: str | None = None
    references: References = qemu_like
    cache: str = "writeback"
    force_share: bool = False
    secret: Secrets | None = None
    data_file: Source | None = None
    backing: bool = True
    backing_format: str | None = None
    lock: bool = True
    discard: str = "unmap"


def open_storage(source: Source, *, writable: bool, cache: str) -> Storage:
    """Return a storage for whatever the caller gave: a name, a descriptor, a storage, a readable object."""
    if isinstance(source, str | bytes | os.PathLike | int):
        return FileStorage.open(source, writable=writable, cache=cache)
    if hasattr(source, "read_into") and hasattr(source, "fd_map"):
        return source  # type: ignore[return-value]
    from qcowlib.storage.reader import ReaderStorage

    if writable:
        raise UsageError("an object that can only be read cannot be opened for writing")
    return ReaderStorage(source)


def open_chain(runtime: Runtime, source: Source, options: OpenOptions) -> Chain:
    """Open *source* and what it stands on.  Raises any :class:`~qcowlib.errors.Error`."""
    if options.format is not None and options.format not in FORMATS:
        raise UsageError(f"Unknown driver '{printable(options.format)}'")
    if options.writable and options.force_share:
        raise UsageError("force-share=on can only be used with read-only images")
    if options.discard not in ("unmap", "ignore"):
        raise UsageError(f"Invalid discard option: {printable(options.discard)}")
    # The engine flushes itself: a write of its own that storage made durable would not order anything.
    through = options.writable and options.cache in _WRITE_THROUGH
    options = options._replace(cache=_WRITE_THROUGH.get(options.cache, options.cache))
    opened: list[Storage] = []
    try:
        layers = _open_layers(runtime, source, options, opened)
        return Chain(runtime, layers, punch=options.discard == "unmap", write_through=through)
    except BaseException:
        for storage in opened:
            storage.close()
        raise


def _open_layers(runtime: Runtime, source: Source, options: OpenOptions, opened: list[Storage]) -> list[Layer]:
    storage = open_storage(source, writable=options.writable, cache=options.cache)
    opened.append(storage)
    fmt = options.format or probe_format(storage)
    layers: list[Layer] = []
    seen: set[tuple[int, int]] = set()
    cache_bytes = CACHE_BYTES
    while True:
        try:
            layer = _open_layer(runtime, storage, fmt, options, opened, len(layers), seen, cache_bytes)
            layers.append(layer)
            if not isinstance(layer, Qcow2Image) or not layer.header.backing_file or not options.backing:
                return layers
            if len(layers) >= MAX_DEPTH:
                raise FormatError(f"the chain has more than {MAX_DEPTH} layers", path=storage.name)
        except Error as error:
            # Source: qemu says it once for each layer above.
            _prefix(error, "Could not open backing file: " * len(layers))
            raise
        storage, fmt = _open_backing(layer, options, len(layers) - 1)
        opened.append(storage)
        # Lower layers share what is left: memory is bounded for the whole chain.
        cache_bytes = max(MIN_CACHE_BYTES, min(4 * MiB, cache_bytes))


def _open_layer(
    runtime: Runtime,
    storage: Storage,
    fmt: str,
    options: OpenOptions,
    opened: list[Storage],
    depth: int,
    seen: set[tuple[int, int]],
    cache_bytes: int,
) -> Layer:
    writable = options.writable and not depth
    _remember(storage, seen)
    _lock(storage, fmt, options, writable=writable)
    if fmt == "luks":
        storage = _open_luks(storage, options, depth)
    if fmt == "qcow2":
        return _open_qcow2(runtime, storage, options, opened, depth, cache_bytes)
    if not depth and options.snapshot is not None:
        raise UsageError("raw images have no snapshots", path=storage.name)
    return RawImage(runtime, storage, writable=writable)


def _prefix(error: Error, text: str) -> None:
    error.message = text + error.message
    error.args = (error.message, *error.args[1:])


def _remember(storage: Storage, seen: set[tuple[int, int]]) -> None:
    identity = getattr(storage, "identity", None)
    if identity is not None:
        if identity in seen:
            raise FormatError(f"Backing file '{printable(storage.name)}' creates an infinite loop.", path=storage.name)
        seen.add(identity)


def _lock(storage: Storage, fmt: str, options: OpenOptions, *, writable: bool) -> None:
    if not options.lock or not isinstance(storage, FileStorage):
        return
    from qcowlib.storage.imagelock import lock_image

    if options.force_share:
        lock_image(storage.fileno(), storage.name, "force_share")
    else:
        # Raw images promise nothing to others, as in qemu: they have no metadata to lose.
        lock_image(storage.fileno(), storage.name, "write" if writable else "read", reserve=fmt != "raw")


def _open_qcow2(
    runtime: Runtime, storage: Storage, options: OpenOptions, opened: list[Storage], depth: int, cache_bytes: int
) -> Qcow2Image:
    top = not depth
    writable = options.writable and top
    if writable and not storage.writable:
        raise ReadOnly("the storage is open for reading", path=storage.name)
    header = read_header(storage, writable=writable)
    snapshot = _find_snapshot(storage, header, options.snapshot) if top and options.snapshot is not None else None
    repairs: tuple[str, ...] = ()
    if writable and header.is_dirty:
        header, repairs = _repair_refcounts(storage)
    data: Storage | None = None
    if header.has_data_file:
        data = _open_data_file(storage, header, options, writable)
        opened.append(data)
        if getattr(data, "identity", data) == getattr(storage, "identity", storage):
            raise FormatError("the data file is the image itself", path=storage.name)
    cipher = _cipher(storage, header, options, depth) if header.crypt_method != CRYPT_NONE else None
    image = Qcow2Image(
        runtime,
        storage,
        header,
        data=data,
        cipher=cipher,
        writable=writable,
        cache_bytes=cache_bytes,
        snapshot=snapshot,
    )
    image.repairs = repairs
    return image


def _repair_refcounts(storage: Storage) -> tuple[Header, tuple[str, ...]]:
    """Source: qemu repairs an image with the dirty bit inside a writable open."""
    from qcowlib.qcow2.repair import repair

    report = repair(storage, "all")
    if report.corruptions or report.check_errors:
        raise CorruptImage("the refcounts are stale (dirty bit) and could not be repaired", path=storage.name)
    return read_header(storage, writable=True), tuple(finding.message for finding in report.repairs)


def _find_snapshot(storage: Storage, header: Header, wanted: str) -> SnapshotEntry:
    """Find a snapshot by id, else by name."""
    key = wanted.encode(errors="surrogateescape")
    entries = read_snapshots(storage, header)
    for entry in entries:
        if entry.id == key:
            return entry
    for entry in entries:
        if entry.name == key:
            return entry
    raise UsageError(f"Can't find snapshot '{printable(wanted)}'", path=storage.name)


def _open_data_file(storage: Storage, header: Header, options: OpenOptions, writable: bool) -> Storage:
    if options.data_file is not None:
        return open_storage(options.data_file, writable=writable, cache=options.cache)
    if header.data_file_name is None:
        raise FormatError("'data-file' is required for this image", path=storage.name)
    name = os.fsdecode(header.data_file_name)
    return options.references.open("data-file", name, storage.name, writable=writable, cache=options.cache)


def _open_backing(image: Qcow2Image, options: OpenOptions, depth: int) -> tuple[Storage, str]:
    header = image.header
    owner = image.storage.name
    stored = os.fsdecode(header.backing_file or b"")
    try:
        name = name_of(options.references, stored, owner)
        fmt = name.format or (os.fsdecode(header.backing_format) if header.backing_format else None)
        if options.backing_format is not None and not depth:
            fmt = options.backing_format
        if fmt is not None and fmt not in FORMATS:
            raise UsageError(f"Unknown driver '{printable(fmt)}'", path=owner)
        storage = options.references.open("backing", name.path, owner, writable=False, cache=options.cache)
    except Error as error:
        _prefix(error, "Could not open backing file: " * (depth + 1))
        error.path = owner
        raise
    if fmt is None:
        try:
            if probe_format(storage) != "raw":
                raise FormatError(
                    f"the format of backing file '{printable(stored)}' is not recorded",
                    path=owner,
                    hint="Give it (backing_format=...) or record it (qcow rebase -u -F ...).",
                )
            fmt = "raw"
        except BaseException:
            storage.close()
            raise
    return storage, fmt


def _secret(storage: Storage, options: OpenOptions, depth: int, parameter: str) -> Passphrase:
    """Return the passphrase of the layer *depth* layers down.  Raises SecretError when there is none."""
    secret = options.secret
    if isinstance(secret, Mapping):
        secret = secret.get(storage.name)
    elif isinstance(secret, list | tuple):
        secret = secret[depth] if depth < len(secret) else None
    if secret is None:
        raise SecretError(f"Parameter '{parameter}' is required for cipher", path=storage.name)
    return secret  # type: ignore[return-value]


def secrets_below(secret: Secrets | None, depth: int) -> Secrets | None:
    """Return the secrets for opening the layer *depth* layers down by itself."""
    return secret[depth:] if isinstance(secret, list | tuple) else secret


def _open_luks(storage: Storage, options: OpenOptions, depth: int) -> Storage:
    """Return what is inside the LUKS file *storage*, which the caller closes on an error."""
    from qcowlib.storage.encrypted import open_luks

    secret = _secret(storage, options, depth, "key-secret")
    try:
        return open_luks(storage, secret)
    except Error as error:
        error.path = error.path or storage.name
        raise


def _cipher(storage: Storage, header: Header, options: OpenOptions, depth: int) -> Cipher:
    """Unlock an encrypted image.  Raises SecretError for a missing or wrong passphrase."""
    secret = _secret(storage, options, depth, "encrypt.key-secret")
    try:
        if header.crypto is None:
            from qcowlib.crypto import legacy_aes

            return legacy_aes(secret)
        from qcowlib.luks import LuksHeader

        if header.crypto.length > _MAX_LUKS_AREA:
            raise FormatError("the LUKS header is larger than any that is known", path=storage.name)
        area = bytearray(min(header.crypto.length, max(storage.size - header.crypto.offset, 0)))
        storage.read_into(header.crypto.offset, [area])
        return LuksHeader.open(area, secret)
    except Error as error:
        error.path = error.path or storage.name
        raise
