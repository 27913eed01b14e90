# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Opening what the command line names.

Invariant: every failure to open reads ``Could not open 'NAME': CAUSE`` with
the name as typed.
"""

from __future__ import annotations

from qcowlib.cli.console import Failure
from qcowlib.errors import Error
from qcowlib.ondisk.header import HEADER_READ, Header, header_read_size, is_qcow2
from qcowlib.storage.file import FileStorage
from qcowlib.storage.imagelock import lock_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.cli.names import ImageRef
    from qcowlib.storage.base import Storage

__all__ = ["full_backing_name", "hint_text", "is_plain_path", "open_failure", "open_storage", "read_header"]


def hint_text(error: Error) -> str:
    """Return the hint of *error* as the console prints it."""
    return f"{error.hint}\n" if error.hint else ""


def open_failure(name: str, error: Error, *, code: int = 1) -> Failure:
    """Return the failure for an image that could not be opened."""
    return Failure(f"Could not open '{name}': {error.message}", hint=hint_text(error), code=code)


def open_storage(ref: ImageRef, *, force_share: bool = False) -> tuple[FileStorage, Storage, Header | None]:
    """Open the file of *ref* for reading and lock it.

    Returns the file, what the format sees of it (the same without windows),
    and the header if it is qcow2.  Raises :class:`Failure`.
    """
    try:
        file = FileStorage.open(ref.path)
    except Error as error:
        raise open_failure(ref.text, error) from None
    try:
        view = _windowed(file, ref)
        header = read_header(view, ref.format)
        access = "force_share" if force_share else "read"
        lock_image(file.fileno(), file.name, access, reserve=header is not None)  # type: ignore[arg-type]
        return file, view, header
    except Error as error:
        file.close()
        raise open_failure(ref.text, error) from None
    except BaseException:
        file.close()
        raise


def _windowed(file: FileStorage, ref: ImageRef) -> Storage:
    storage: Storage = file
    for window in reversed(ref.windows):
        storage = _window(storage, ref, window.offset, window.size)
    return storage


def _window(storage: Storage, ref: ImageRef, offset: int, size: int | None) -> Storage:
    from qcowlib.storage.view import StorageView

    total = -(-storage.size // 512) * 512
    if offset > total:
        raise Failure(
            f"Could not open '{ref.text}': Offset ({offset}) cannot be greater than size of the containing file "
            f"({total})"
        )
    if size is not None and size > total - offset:
        raise Failure(
            f"Could not open '{ref.text}': The sum of offset ({offset}) and size ({size}) has to be smaller or equal "
            f"to the  actual size of the containing file ({total})"
        )
    return StorageView(storage, offset, max(0, storage.size - offset) if size is None else size)


def read_header(storage: Storage, fmt: str | None) -> Header | None:
    """Return the header of the qcow2 image in *storage*, None if it is raw.

    Without *fmt* the first bytes decide.  Raises FormatError.
    """
    if fmt == "raw":
        return None
    size = storage.size
    data = bytearray(min(HEADER_READ, size))
    storage.read_into(0, [data])
    if fmt is None and not is_qcow2(bytes(data)):
        return None
    wanted = min(header_read_size(bytes(data)), size)
    if wanted > len(data):
        data = bytearray(wanted)
        storage.read_into(0, [data])
    return Header.parse(bytes(data), size, path=storage.name, no_io=True)


def is_plain_path(name: str) -> bool:
    """Return whether *name* is a path and not ``protocol:rest``."""
    colon = name.find(":")
    return colon < 0 or "/" in name[:colon]


def full_backing_name(path: str, backing: str) -> str:
    """Return *backing* as seen from the image in *path* that names it."""
    if not is_plain_path(backing) or backing.startswith("/"):
        return backing
    slash = path.rfind("/")
    return path[: slash + 1] + backing
