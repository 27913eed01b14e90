# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Making image files for ``create``, ``convert`` and ``dd``.

Invariant: a file that could not be made completely is removed again.
"""

from __future__ import annotations

import errno
import os
from contextlib import closing
from typing import TYPE_CHECKING

from qcowlib.cli.console import Failure
from qcowlib.cli.encryption import encryption_of, luks_area, luks_size
from qcowlib.cli.names import image_ref, strip_protocol
from qcowlib.cli.opening import hint_text, open_storage
from qcowlib.errors import Error, StorageError
from qcowlib.info import full_backing_name
from qcowlib.jobs.creation import file_options, new_data_file, new_storage
from qcowlib.qcow2.create import CreateOptions, create_raw
from qcowlib.qcow2.create import create as create_qcow2

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from qcowlib.cli.optlist import OptionList

__all__ = [
    "UNKNOWN_SIZE",
    "Request",
    "can_create",
    "create",
    "job_options",
    "not_made",
    "protocol_path",
    "resolve_backing",
]

_FORMAT_NAMES = (
    "blkdebug blklogwrites blkverify bochs cloop compress copy-before-write copy-on-read dmg file ftp "
    "ftps gluster host_cdrom host_device http https iscsi iser luks nbd nfs null-aio null-co nvme "
    "parallels preallocate qcow qcow2 qed quorum raw rbd replication snapshot-access ssh throttle vdi "
    "vhdx vmdk vpc vvfat"
)
#: What a backing format may be called, whether or not it can be read here.
KNOWN_FORMATS = dict.fromkeys(_FORMAT_NAMES.split())

#: An absent size, as qemu-img represents it; a size given as 2**64 - 1 counts as absent too.
UNKNOWN_SIZE = (1 << 64) - 1
_MAX_FILE = (1 << 63) - 512


class Request:
    """An image to be made: *name* as typed, *path* of the file, *values* of the options."""

    __slots__ = ("fmt", "name", "path", "values")

    def __init__(self, fmt: str, name: str, path: str, values: OptionList) -> None:
        self.fmt = fmt
        self.name = name
        self.path = path
        self.values = values

    @property
    def size(self) -> int:
        """Virtual size in whole sectors."""
        return -(-self.values.number("size", 0) // 512) * 512


def can_create(fmt: str) -> bool:
    """Return whether images of format *fmt* can be made."""
    return fmt in ("qcow2", "raw", "file", "luks")


def not_made(fmt: str, unknown: str | None = None) -> Failure:
    """Return the failure for a format that cannot be made; *unknown* is said of a name that is none."""
    if fmt in KNOWN_FORMATS:
        return Failure(f"Format driver '{fmt}' does not support image creation")
    return Failure("Unknown file format" + (f" '{fmt}'" if unknown is None else unknown))


def protocol_path(name: str) -> str:
    """Return the path of the file to make; ``json:`` names cannot be made.  Raises :class:`Failure`."""
    if not name:
        return name
    try:
        return strip_protocol(name)
    except Failure:
        protocol = name.partition(":")[0]
        if protocol == "blkdebug":
            raise Failure("Protocol driver 'blkdebug' does not support image creation") from None
        raise Failure(f"Unknown protocol '{protocol}'") from None


def resolve_backing(request: Request, backing: str, *, unsafe: bool) -> None:
    """Open the backing file (unless *unsafe*) and take the size from it if there is none.

    Raises :class:`Failure`, also if its format was not given.
    """
    fmt = request.values.text("backing_fmt")
    detected = None
    if not unsafe:
        full = full_backing_name(request.path, backing)
        try:
            detected, size = _probe_backing(full, fmt)
        except Failure as failure:
            raise Failure(*failure.messages, hint=f"{failure.hint}Could not open backing image.\n") from None
        if request.values.number("size", UNKNOWN_SIZE) == UNKNOWN_SIZE:
            request.values.set("size", size)
    if fmt is None:
        hint = f"Detected format of {detected}." if detected else ""
        raise Failure("Backing file specified without backing format", hint=hint)


def _probe_backing(name: str, fmt: str | None) -> tuple[str, int]:
    """Return format and size of a backing file."""
    prefix = f"Could not open '{name}': "
    try:
        ref = image_ref(name, fmt)
        file, view, header = open_storage(ref)
    except Failure as failure:
        raise Failure(*(message.removeprefix(prefix) for message in failure.messages), hint=failure.hint) from None
    with closing(file):
        if header is not None:
            return "qcow2", header.size
        if ref.format == "luks":
            return "luks", luks_size(view)
        return "raw", -(-view.size // 512) * 512


def create(request: Request, secrets: Mapping[str, bytes]) -> None:
    """Make the image.  Raises :class:`Failure`; the file is removed then."""
    try:
        if request.fmt == "qcow2":
            _create_qcow2(request, secrets)
        elif request.fmt == "luks":
            _create_luks(request, secrets)
        else:
            _create_raw(request)
    except Error as error:
        raise Failure(_cause(error), hint=hint_text(error)) from None


def _cause(error: Error) -> str:
    if isinstance(error, StorageError) and error.operation in ("resize", "zero", "write", "flush"):
        return error.strerror or error.message
    return error.message


def _check_not_directory(path: str) -> None:
    if os.path.isdir(path):  # noqa: PTH112
        raise Failure(f"Could not create '{path}': Is a directory")


def _create_raw(request: Request) -> None:
    mode = request.values.text("preallocation") or "off"
    if mode == "metadata":
        raise Failure("Unsupported preallocation mode: metadata")
    if mode not in ("off", "falloc", "full"):
        raise Failure(f"invalid parameter value: {mode}")
    _check_not_directory(request.path)
    try:
        with new_storage(request.path, "writeback") as storage:
            if request.size > _MAX_FILE:
                raise Failure("Could not resize file: Invalid argument")
            create_raw(storage, request.size, preallocation=mode)  # type: ignore[arg-type]
    except StorageError as error:
        if error.errno == errno.EFBIG:
            raise Failure(f"The image size is too large for file format '{request.fmt}'") from None
        raise


def _create_luks(request: Request, secrets: Mapping[str, bytes]) -> None:
    _check_not_directory(request.path)
    with new_storage(request.path, "writeback") as storage:
        area = luks_area(request.values, "", secrets, host_sectors=False)
        storage.resize(len(area) + request.size)
        storage.write(0, [area])
        storage.flush()


def _create_qcow2(request: Request, secrets: Mapping[str, bytes]) -> None:
    _check_not_directory(request.path)
    data_name = request.values.text("data_file")
    with new_storage(request.path, "writeback") as storage, new_data_file(data_name, "writeback") as data:
        create_qcow2(storage, _options(request, secrets), data=data)


def _options(request: Request, secrets: Mapping[str, bytes]) -> CreateOptions:
    """Return the options as the format wants them; it knows the rules between them."""
    values = request.values
    backing_format = values.text("backing_fmt")
    if backing_format is not None and backing_format not in KNOWN_FORMATS:
        raise Failure(f"Parameter 'backing-fmt' does not accept value '{backing_format}'")
    described = file_options(
        job_options(values), request.size, backing=values.text("backing_file"), backing_format=backing_format
    )
    return described._replace(encrypt=encryption_of(values, secrets))


_TEXTS = ("compat", "compression_type", "data_file", "preallocation")
_FLAGS = ("data_file_raw", "extended_l2", "lazy_refcounts")
_NUMBERS = ("cluster_size", "refcount_bits")


def job_options(values: OptionList) -> dict[str, Any]:
    """Return the options of a new image by keyword, as :class:`~qcowlib.jobs.creation.NewOptions`."""
    given: dict[str, Any] = {name: values.text(name) for name in _TEXTS if name in values}
    given.update({name: values.flag(name) for name in _FLAGS if name in values})
    given.update({name: values.number(name, 0) for name in _NUMBERS if name in values})
    return given
