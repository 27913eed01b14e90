# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What ``info`` tells of an image, from its header area alone.

Invariant: neither the backing file nor the data file is opened, and no key is
needed.
"""

from __future__ import annotations

from qcowlib.errors import printable
from qcowlib.info import full_backing_name, image_info
from qcowlib.units import human_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qcowlib.cli.jsonout import Json
    from qcowlib.cli.names import ImageRef
    from qcowlib.ondisk import Header
    from qcowlib.storage.base import Storage

__all__ = ["describe", "snapshot_table"]


def describe(ref: ImageRef, file: Storage, storage: Storage, header: Header | None) -> dict[str, Json]:
    """Return what is known of an open image, under the names of the JSON output.

    Raises FormatError, StorageError.
    """
    result = image_info(storage, header, filename=ref.shown, file=file).to_dict()
    if ref.debug is not None:
        # Source: qemu-img asks what stands before the file, which does not know.
        result.pop("actual-size", None)
    if ref.format == "luks":
        _describe_luks(result, storage)
    elif header is None and ref.is_file:
        result["format"] = "file"
    elif "backing-filename" in result:
        result["full-backing-filename"] = full_backing_name(ref.path, str(result["backing-filename"]))
    return result


def _describe_luks(result: dict[str, Json], storage: Storage) -> None:
    from qcowlib.cli.encryption import luks_header, luks_size

    result["format"] = "luks"
    result["encrypted"] = True
    result["virtual-size"] = luks_size(storage)
    result["format-specific"] = {"type": "luks", "data": luks_header(storage).info()}  # type: ignore[dict-item]


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
