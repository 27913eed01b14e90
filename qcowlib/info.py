# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What an image says about itself, from its header area alone.

Invariant: neither the backing file nor the data file is opened, and no key is
needed.
"""

from __future__ import annotations

import os

from qcowlib.driver import Bitmap, Snapshot
from qcowlib.ondisk.header import Header
from qcowlib.qcow2.directories import read_bitmaps, read_snapshots
from qcowlib.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NamedTuple

    from qcowlib.storage.base import Storage

    Json = None | bool | int | str | Sequence["Json"] | Mapping[str, "Json"]
else:
    from qcowlib.records import NamedTuple

__all__ = ["ImageInfo", "image_info"]


class ImageInfo(NamedTuple):
    """The answer of ``info``; sizes in bytes, names decoded.

    ``actual_size`` is what the file system has given the file, ``None`` where
    that cannot be told.  ``encryption`` is ``luks``, ``aes`` or ``None``;
    ``luks`` what its LUKS header says, under qemu's names.
    """

    filename: str
    format: str
    virtual_size: int
    actual_size: int | None
    cluster_size: int | None = None
    version: int | None = None
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    data_file_raw: bool | None = None
    dirty: bool = False
    corrupt: bool = False
    lazy_refcounts: bool = False
    extended_l2: bool = False
    refcount_bits: int | None = None
    compression: str | None = None
    encryption: str | None = None
    luks: Mapping[str, object] | None = None
    snapshots: tuple[Snapshot, ...] = ()
    bitmaps: tuple[Bitmap, ...] = ()

    def to_dict(self) -> dict[str, Json]:
        """Return it under the names of qemu-img's JSON output."""
        result: dict[str, Json] = {"filename": self.filename, "dirty-flag": self.dirty}
        if self.actual_size is not None:
            result["actual-size"] = self.actual_size
        result["virtual-size"] = self.virtual_size
        result["format"] = self.format
        if self.cluster_size is None:
            return result
        result["cluster-size"] = self.cluster_size
        if self.encryption is not None:
            result["encrypted"] = True
        if self.backing_file is not None:
            result["backing-filename"] = self.backing_file
            result["full-backing-filename"] = full_backing_name(self.filename, self.backing_file)
            if self.backing_format is not None:
                result["backing-filename-format"] = self.backing_format
        if self.snapshots:
            result["snapshots"] = [_snapshot(entry) for entry in self.snapshots]
        result["format-specific"] = {"type": "qcow2", "data": self._specific()}
        return result

    def _specific(self) -> dict[str, Json]:
        data: dict[str, Json] = {
            "compat": "0.10" if self.version == 2 else "1.1",
            "compression-type": self.compression,
            "refcount-bits": self.refcount_bits,
        }
        if self.version != 2:
            data["lazy-refcounts"] = self.lazy_refcounts
            data["corrupt"] = self.corrupt
            data["extended-l2"] = self.extended_l2
            if self.bitmaps:
                data["bitmaps"] = [_bitmap(entry) for entry in self.bitmaps]
            if self.data_file is not None:
                data["data-file"] = self.data_file
            if self.data_file_raw is not None:
                data["data-file-raw"] = self.data_file_raw
        if self.encryption is not None:
            data["encrypt"] = {**(self.luks or {}), "format": self.encryption}  # type: ignore[dict-item]
        return data


def is_plain_path(name: str) -> bool:
    """Return whether *name* is a path and not ``protocol:rest``."""
    colon = name.find(":")
    return colon < 0 or "/" in name[:colon]


def full_backing_name(path: str, backing: str) -> str:
    """Return *backing* as seen from the image in *path* that names it."""
    if not is_plain_path(backing) or backing.startswith("/"):
        return backing
    return path[: path.rfind("/") + 1] + backing


def allocated_bytes(storage: Storage) -> int | None:
    """What the file system has given a file; ``None`` where there is no file."""
    fileno = getattr(storage, "fileno", None)
    return None if fileno is None else os.fstat(fileno()).st_blocks * SECTOR


def image_info(
    storage: Storage, header: Header | None, *, filename: str | None = None, file: Storage | None = None
) -> ImageInfo:
    """Return the info of the image in *storage*; *header* is ``None`` for raw.

    *file* is what the storage lies in, where it is only a part of a file.

    Raises: FormatError, StorageError when a table that it names cannot be read.
    """
    name = storage.name if filename is None else filename
    actual = allocated_bytes(storage if file is None else file)
    if header is None:
        return ImageInfo(name, "raw", round_up(storage.size, SECTOR), actual)
    encryption, luks = _encryption(storage, header)
    return ImageInfo(
        name,
        "qcow2",
        header.size,
        actual,
        cluster_size=header.cluster_size,
        version=header.version,
        backing_file=_text(header.backing_file),
        backing_format=_text(header.backing_format),
        data_file=_text(header.data_file_name) if header.has_data_file else None,
        data_file_raw=header.data_file_raw if header.has_data_file else None,
        dirty=header.is_dirty,
        corrupt=header.is_corrupt,
        lazy_refcounts=header.lazy_refcounts,
        extended_l2=header.extended_l2,
        refcount_bits=header.refcount_bits,
        compression="zstd" if header.compression_type else "zlib",
        encryption=encryption,
        luks=luks,
        snapshots=tuple(map(Snapshot.of, read_snapshots(storage, header))),
        bitmaps=tuple(map(Bitmap.of, read_bitmaps(storage, header))) if header.version >= 3 else (),
    )


def _encryption(storage: Storage, header: Header) -> tuple[str | None, Mapping[str, object] | None]:
    if header.crypt_method == 1:
        return "aes", None
    if header.crypto is None:
        return None, None
    from qcowlib.luks import HEADER_BYTES, LuksHeader

    area = bytearray(HEADER_BYTES)
    storage.read_into(header.crypto.offset, [area])
    return "luks", LuksHeader.parse(area).info()


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode("utf-8", "surrogateescape")


def _bitmap(bitmap: Bitmap) -> dict[str, Json]:
    flags = [name for name, given in (("in-use", bitmap.inconsistent), ("auto", bitmap.enabled)) if given]
    return {"flags": flags, "name": bitmap.name, "granularity": bitmap.granularity}


def _snapshot(entry: Snapshot) -> dict[str, Json]:
    result: dict[str, Json] = {
        "vm-clock-nsec": entry.vm_clock_nsec % 1_000_000_000,
        "vm-clock-sec": entry.vm_clock_nsec // 1_000_000_000,
        "name": entry.name,
        "id": entry.id,
        "date-sec": entry.date // 1_000_000_000,
        "date-nsec": entry.date % 1_000_000_000,
        "vm-state-size": entry.vm_state_size,
    }
    if entry.icount is not None:
        result["icount"] = entry.icount
    return result
