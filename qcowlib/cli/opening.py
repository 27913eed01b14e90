# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Opening what the command line names.

Invariant: every failure to open reads ``Could not open 'NAME': CAUSE`` with
the name as typed.
"""

from __future__ import annotations

import os

from qcowlib.cli.console import Failure
from qcowlib.cli.names import FORMATS
from qcowlib.cli.objects import passphrase
from qcowlib.errors import Error, printable
from qcowlib.ondisk.header import HEADER_READ, Header, header_read_size, is_qcow2
from qcowlib.storage.file import FileStorage
from qcowlib.storage.imagelock import lock_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

    from qcowlib.cli.console import Console
    from qcowlib.cli.names import ImageRef
    from qcowlib.gate import References
    from qcowlib.image import Image
    from qcowlib.storage.base import Storage

__all__ = [
    "hint_text",
    "luks_secret",
    "open_failure",
    "open_image",
    "open_storage",
    "read_header",
    "recognise_luks",
    "references",
    "secret_of",
    "tell_lost_bitmaps",
    "tell_probed_raw",
]

_LUKS1 = b"LUKS\xba\xbe\0\1"
_LOST_BITMAPS = (
    "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent",
    "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix.",
)
_PROBED_RAW = (
    "WARNING: Image format was not specified for '{}' and probing guessed raw.\n"
    "         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be "
    "restricted.\n"
    "         Specify the 'raw' format explicitly to remove the restrictions.\n"
)


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
        recognise_luks(ref, view)
        access = "force_share" if force_share else "read"
        reserve = header is not None or ref.format == "luks"
        if ref.locking:
            lock_image(file.fileno(), file.name, access, reserve=reserve)  # type: ignore[arg-type]
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
    if fmt in ("raw", "luks"):
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


class _Given:
    """A policy that opens the backing files which the command line names, and asks *policy* for others."""

    def __init__(self, ref: ImageRef, policy: References) -> None:
        self._policy = policy
        self._paths: dict[str, str] = {}
        layer = ref
        while layer.backing is not None and layer.backing.path:
            self._paths[layer.path] = layer.backing.path
            layer = layer.backing

    def open(
        self, kind: Literal["backing", "data-file"], name: str, owner: str, *, writable: bool, cache: str
    ) -> Storage:
        given = self._paths.get(owner) if kind == "backing" else None
        if given is not None:
            return FileStorage.open(given, writable=writable, cache=cache)
        return self._policy.open(kind, name, owner, writable=writable, cache=cache)


def references(ref: ImageRef | None = None) -> References:
    """Return the policy for files that images name, from ``QCOW_REFERENCES``, with what *ref* says itself.

    Raises :class:`Failure`.
    """
    if ref is not None and ref.backing is not None:
        return _Given(ref, references())
    from qcowlib import gate

    wanted = os.environ.get("QCOW_REFERENCES", "any")
    if wanted == "any":
        return gate.qemu_like
    if wanted == "folder":
        return gate.same_directory()
    if wanted == "none":
        return gate.deny_all
    raise Failure(f"QCOW_REFERENCES must be any, folder or none, not '{printable(wanted)}'")


def recognise_luks(ref: ImageRef, view: Storage) -> None:
    """Set the format of *ref* if none was asked for and *view* is a LUKS file."""
    if ref.format is None:
        head = bytearray(8)
        view.read_into(0, [head])
        if head == _LUKS1:
            ref.format = "luks"


def luks_secret(ref: ImageRef, secrets: Mapping[str, bytes]) -> bytes:
    """Return the passphrase of a LUKS file.  Raises :class:`Failure`."""
    phrase = secret_of(ref, secrets)
    if phrase is None:
        raise Failure(f"Could not open '{ref.text}': Parameter 'key-secret' is required for cipher")
    return phrase


def tell_probed_raw(ref: ImageRef, image: Image, console: Console) -> None:
    """Warn before writing to an image that is raw only because nothing else was recognised."""
    if ref.format is None and image.format == "raw":
        console.err(_PROBED_RAW.format(ref.text))


def tell_lost_bitmaps(header: Header | None, console: Console) -> None:
    """Warn if the image has bitmaps that can no longer be trusted."""
    if header is not None and header.bitmaps is not None and not header.bitmaps_valid:
        console.warn(*_LOST_BITMAPS)


def open_image(
    ref: ImageRef,
    console: Console,
    *,
    secrets: Mapping[str, bytes],
    writable: bool = False,
    force_share: bool = False,
    cache: str = "writeback",
    snapshot: str | None = None,
    backing: bool = True,
    code: int = 1,
) -> Image:
    """Open *ref* and what it stands on.  Raises :class:`Failure` with exit status *code*."""
    from qcowlib.image import open as open_any

    try:
        source = _source(ref, writable, cache, force_share, secrets)
        image = open_any(
            source,
            "r+" if writable else "r",
            format="raw" if ref.format == "luks" and not isinstance(source, str) else ref.format,
            snapshot=snapshot,
            cache=cache,  # type: ignore[arg-type]
            force_share=force_share,
            lock=ref.locking,
            secret=layer_secrets(ref, secrets),
            data_file=ref.data_file,
            backing=backing,
            backing_format=ref.backing.format if ref.backing is not None else None,
            references=references(ref),
        )
    except Error as error:
        raise open_failure(ref.text, error, code=code) from None
    if backing and len(image.layers) <= _said_below(ref):
        image.close()
        raise Failure(f"Could not open '{ref.text}': 'backing' is for images that name a backing file", code=code)
    for line in getattr(image.layers[0], "repairs", ()):
        console.err(f"{line}\n")
    if writable:
        tell_probed_raw(ref, image, console)
    tell_lost_bitmaps(getattr(image.layers[0], "header", None), console)
    return image


def _said_below(ref: ImageRef) -> int:
    count = 0
    while ref.backing is not None:
        ref = ref.backing
        count += 1
    return count


def _source(
    ref: ImageRef, writable: bool, cache: str, force_share: bool, secrets: Mapping[str, bytes]
) -> str | Storage:
    if ref.format in FORMATS and not ref.windows:
        return ref.path
    file = FileStorage.open(ref.path, writable=writable, cache=cache)
    try:
        view = _windowed(file, ref)
        recognise_luks(ref, view)
        if ref.format != "luks":
            return view if ref.windows else file
        access = "force_share" if force_share else "write" if writable else "read"
        if ref.locking:
            lock_image(file.fileno(), file.name, access)  # type: ignore[arg-type]
        from qcowlib.storage.encrypted import open_luks

        return open_luks(view, luks_secret(ref, secrets))
    except BaseException:
        file.close()
        raise


def secret_of(ref: ImageRef, secrets: Mapping[str, bytes]) -> bytes | None:
    """Return the passphrase that *ref* names.  Raises :class:`Failure` if it was not given."""
    return layer_secrets(ref, secrets)[0]


def layer_secrets(ref: ImageRef, secrets: Mapping[str, bytes]) -> list[bytes | None]:
    """Return the passphrases of the layers, the top one's first.  Raises :class:`Failure` for one not given."""
    found: list[bytes | None] = []
    layer: ImageRef | None = ref
    while layer is not None:
        try:
            found.append(passphrase(layer.secret, secrets) if layer.secret is not None else None)
        except Failure as failure:
            above = "Could not open backing file: " * len(found)
            raise Failure(f"Could not open '{ref.text}': {above}{failure.messages[0]}") from None
        layer = layer.backing
    return found


def check_backing(ref: ImageRef, header: Header) -> None:
    """Open and close the backing chain of *ref*, as opening the image would.  Raises :class:`Failure`."""
    if not header.backing_file:
        return
    from qcowlib.gate import parse_name
    from qcowlib.image import open as open_any

    policy = references()
    fmt = header.backing_format.decode("utf-8", "surrogateescape") if header.backing_format else None
    try:
        named = parse_name(header.backing_file.decode("utf-8", "surrogateescape"), owner=ref.path)
        storage = policy.open("backing", named.path, ref.path, writable=False, cache="writeback")
        open_any(storage, format=fmt or named.format, references=policy).close()
    except Error as error:
        error.message = f"Could not open backing file: {error.message}"
        raise open_failure(ref.text, error) from None
