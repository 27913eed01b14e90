# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What ``info`` tells of an image, from its header area alone.

Invariant: neither the backing file nor the data file is opened, and no key is
needed.
"""

from __future__ import annotations

import os

from qcowlib.cli.opening import full_backing_name
from qcowlib.errors import printable
from qcowlib.units import human_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qcowlib.cli.jsonout import Json
    from qcowlib.cli.names import ImageRef
    from qcowlib.ondisk import BitmapEntry, Header, SnapshotEntry
    from qcowlib.storage.base import Storage
    from qcowlib.storage.file import FileStorage

__all__ = ["describe", "read_bitmaps", "read_snapshots", "snapshot_table"]


def describe(ref: ImageRef, file: FileStorage, storage: Storage, header: Header | None) -> dict[str, Json]:
    """Return what is known of an open image, under the names of the JSON output.

    Raises FormatError, StorageError.
    """
    allocated = os.fstat(file.fileno()).st_blocks * 512
    result: dict[str, Json] = {"filename": ref.shown, "actual-size": allocated, "dirty-flag": False}
    if header is None:
        result["virtual-size"] = -(-storage.size // 512) * 512
        result["format"] = "file" if ref.is_file else "raw"
        return result
    result["virtual-size"] = header.size
    result["format"] = "qcow2"
    result["cluster-size"] = header.cluster_size
    result["dirty-flag"] = header.is_dirty
    if header.crypt_method:
        result["encrypted"] = True
    if header.backing_file is not None:
        backing = header.backing_file.decode("utf-8", "surrogateescape")
        result["backing-filename"] = backing
        result["full-backing-filename"] = full_backing_name(ref.path, backing)
        if header.backing_format is not None:
            result["backing-filename-format"] = header.backing_format.decode("utf-8", "surrogateescape")
    snapshots = read_snapshots(storage, header)
    if snapshots:
        result["snapshots"] = [_snapshot(entry) for entry in snapshots]
    result["format-specific"] = {"type": "qcow2", "data": _specific(storage, header)}
    return result


def _specific(storage: Storage, header: Header) -> dict[str, Json]:
    compression = "zstd" if header.compression_type else "zlib"
    if header.version < 3:
        return _with_encryption(
            {"compat": "0.10", "compression-type": compression, "refcount-bits": header.refcount_bits}, storage, header
        )
    data: dict[str, Json] = {
        "compat": "1.1",
        "compression-type": compression,
        "lazy-refcounts": header.lazy_refcounts,
        "refcount-bits": header.refcount_bits,
        "corrupt": header.is_corrupt,
        "extended-l2": header.extended_l2,
    }
    bitmaps = read_bitmaps(storage, header)
    if bitmaps:
        data["bitmaps"] = [_bitmap(entry) for entry in bitmaps]
    if header.has_data_file:
        if header.data_file_name is not None:
            data["data-file"] = header.data_file_name.decode("utf-8", "surrogateescape")
        data["data-file-raw"] = header.data_file_raw
    return _with_encryption(data, storage, header)


def _with_encryption(data: dict[str, Json], storage: Storage, header: Header) -> dict[str, Json]:
    if header.crypt_method == 1:
        data["encrypt"] = {"format": "aes"}
    elif header.crypto is not None:
        from qcowlib.luks import HEADER_BYTES, LuksHeader

        area = bytearray(HEADER_BYTES)
        storage.read_into(header.crypto.offset, [area])
        data["encrypt"] = {**LuksHeader.parse(area).info(), "format": "luks"}  # type: ignore[dict-item]
    return data


def _bitmap(entry: BitmapEntry) -> dict[str, Json]:
    flags = [name for name, given in (("in-use", entry.in_use), ("auto", entry.auto)) if given]
    return {
        "flags": flags,
        "name": entry.name.decode("utf-8", "surrogateescape"),
        "granularity": entry.granularity,
    }


def _snapshot(entry: SnapshotEntry) -> dict[str, Json]:
    result: dict[str, Json] = {
        "vm-clock-nsec": entry.vm_clock_nsec % 1_000_000_000,
        "vm-clock-sec": entry.vm_clock_nsec // 1_000_000_000,
        "name": entry.name.decode("utf-8", "surrogateescape"),
        "id": entry.id.decode("utf-8", "surrogateescape"),
        "date-sec": entry.date_sec,
        "date-nsec": entry.date_nsec,
        "vm-state-size": entry.vm_state_size,
    }
    if entry.icount is not None:
        result["icount"] = entry.icount
    return result


def read_snapshots(storage: Storage, header: Header) -> list[SnapshotEntry]:
    """Return the snapshot table.  Raises FormatError, StorageError."""
    if not header.nb_snapshots:
        return []
    from qcowlib.ondisk.snapshots import ShortTable, parse_snapshots

    wanted = 4096
    while True:
        data = bytearray(wanted)
        storage.read_into(header.snapshots_offset, [data])
        try:
            return parse_snapshots(bytes(data), header.nb_snapshots, path=storage.name)
        except ShortTable as short:
            wanted = max(short.needed, 2 * wanted)


def read_bitmaps(storage: Storage, header: Header) -> list[BitmapEntry]:
    """Return the bitmap directory, empty if it cannot be trusted.  Raises FormatError, StorageError."""
    if header.bitmaps is None or not header.bitmaps_valid:
        return []
    from qcowlib.ondisk.bitmaps import parse_bitmap_directory

    extension = header.bitmaps
    data = bytearray(extension.directory_size)
    storage.read_into(extension.directory_offset, [data])
    entries = parse_bitmap_directory(
        bytes(data), extension.nb_bitmaps, header.size, header.cluster_bits, path=storage.name
    )
    return list(entries)


def snapshot_table(snapshots: Sequence[Mapping[str, Json]]) -> str:
    """Return the table of snapshots, dates in local time."""
    import time

    lines = [f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}\n"]
    for entry in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_int(entry["date-sec"])))
        seconds, milliseconds = _int(entry["vm-clock-sec"]), _int(entry["vm-clock-nsec"]) // 1_000_000
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
        size = human_size(_int(entry["vm-state-size"]))
        icount = str(entry["icount"]) if "icount" in entry else ""
        lines.append(f"{_cell(entry['id']):<9} {_cell(entry['name']):<16} {size:>8}{date:>20}{clock:>13}{icount:>11}\n")
    return "".join(lines)


def _int(value: Json) -> int:
    return value if isinstance(value, int) else 0


def _cell(value: Json) -> str:
    return printable(str(value))
