# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Opening what the command line names.

Invariant: every failure to open reads ``Could not open 'NAME': CAUSE`` with
the name as typed.
"""

from __future__ import annotations

import os

from qcowlib.cli.console import Failure
from qcowlib.cli.names import FORMATS, image_ref
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
    from qcowlib.gate import FileName, References
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
        if ref.data_debug is not None or ref.above is not None:
            raise Failure(f"Could not open '{ref.text}': this command does not work through blkdebug")
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
    if ref.debug is not None:
        from qcowlib.cli.blkdebug import DebuggedStorage, rules_of

        debugged = DebuggedStorage(file, rules_of(ref.debug, ref.text), ref.debug, ref.text)
        storage = debugged.guest if ref.windows or ref.format == "luks" else debugged
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


class _Named:
    """The policy ``any``, which also knows files behind ``blkdebug``."""

    def __init__(self) -> None:
        self._debugged: dict[tuple[str, str], ImageRef] = {}

    def parse_name(self, name: str, *, owner: str) -> FileName:
        from qcowlib import gate

        if "blkdebug" not in name:
            return gate.parse_name(name, owner=owner)
        try:
            ref = image_ref(name, None)
        except Failure:
            return gate.parse_name(name, owner=owner)
        # What else a tree may say is not for a name that an image brings.
        plain = not (ref.windows or ref.secret or ref.backing or ref.data_file or ref.above) and ref.locking
        if ref.debug is None or not plain:
            return gate.parse_name(name, owner=owner)
        path = gate.seen_from(owner, ref.path)
        self._debugged[owner, path] = ref
        return gate.FileName(path, ref.format)

    def open(
        self, kind: Literal["backing", "data-file"], name: str, owner: str, *, writable: bool, cache: str
    ) -> Storage:
        from qcowlib.gate import qemu_like

        storage = qemu_like.open(kind, name, owner, writable=writable, cache=cache)
        ref = self._debugged.get((owner, name)) if kind == "backing" else None
        if ref is None or ref.debug is None:
            return storage
        from qcowlib.cli.blkdebug import DebuggedStorage, rules_of

        try:
            return DebuggedStorage(storage, rules_of(ref.debug, ref.text), ref.debug, ref.text)
        except BaseException:
            storage.close()
            raise


class _Given:
    """A policy that opens the backing files which the command line names, and asks *policy* for others."""

    def __init__(self, ref: ImageRef, policy: References) -> None:
        self._policy = policy
        self._paths: dict[str, str] = {}
        layer = ref
        while layer.backing is not None and layer.backing.path:
            self._paths[layer.path] = layer.backing.path
            layer = layer.backing

    def parse_name(self, name: str, *, owner: str) -> FileName:
        from qcowlib.gate import name_of

        return name_of(self._policy, name, owner)

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
    wanted = os.environ.get("QCOW_REFERENCES", "any")
    if wanted == "any":
        return _Named()
    from qcowlib import gate

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
            data_file=_data_file(ref, writable, cache),
            backing=backing,
            backing_format=ref.backing.format if ref.backing is not None else None,
            references=references(ref),
        )
    except Error as error:
        raise open_failure(ref.text, error, code=code) from None
    if backing and len(image.layers) <= _said_below(ref) and not _shows_no_backing(image, ref, code):
        image.close()
        raise Failure(f"Could not open '{ref.text}': 'backing' is for images that name a backing file", code=code)
    if ref.above is not None:
        image = _debugged_image(image, ref)
    for line in getattr(image.layers[0], "repairs", ()):
        console.err(f"{line}\n")
    if writable:
        tell_probed_raw(ref, image, console)
    tell_lost_bitmaps(getattr(image.layers[0], "header", None), console)
    return image


def _debugged_image(image: Image, ref: ImageRef) -> Image:
    from qcowlib.cli.blkdebug import DebuggedImage, rules_of

    try:
        if image.mode != "r":
            raise Failure(f"Could not open '{ref.text}': an image behind blkdebug can only be read")
        return DebuggedImage(image, rules_of(ref.above or {}, ref.text))
    except BaseException:
        image.close()
        raise


def _data_file(ref: ImageRef, writable: bool, cache: str) -> str | Storage | None:
    if ref.data_file is None or ref.data_debug is None:
        return ref.data_file
    from qcowlib.cli.blkdebug import DebuggedStorage, rules_of

    node = ref.data_debug
    rules = rules_of(node, ref.text)
    return DebuggedStorage(FileStorage.open(ref.data_file, writable=writable, cache=cache), rules, node, ref.text)


def _shows_no_backing(image: Image, ref: ImageRef, code: int) -> bool:
    """Whether *image* may have the one backing file that was named: one that its raw data file hides for good."""
    header: Header | None = getattr(image.layers[0], "header", None)
    below = ref.backing
    if header is None or not header.data_file_raw or below is None or below.backing is not None:
        return False
    try:
        FileStorage.open(below.path).close()
    except Error as error:
        image.close()
        error.message = f"Could not open backing file: {error.message}"
        raise open_failure(ref.text, error, code=code) from None
    return True


def _said_below(ref: ImageRef) -> int:
    count = 0
    while ref.backing is not None:
        ref = ref.backing
        count += 1
    return count


def _source(
    ref: ImageRef, writable: bool, cache: str, force_share: bool, secrets: Mapping[str, bytes]
) -> str | Storage:
    if ref.format in FORMATS and not ref.windows and ref.debug is None:
        return ref.path
    file = FileStorage.open(ref.path, writable=writable, cache=cache)
    try:
        view = _windowed(file, ref)
        recognise_luks(ref, view)
        if ref.debug is not None and ref.format != "luks" and ref.locking:
            _lock(file, view, ref, writable, force_share)
        if ref.format != "luks":
            return view if ref.windows or ref.debug is not None else file
        access = "force_share" if force_share else "write" if writable else "read"
        if ref.locking:
            lock_image(file.fileno(), file.name, access)  # type: ignore[arg-type]
        from qcowlib.storage.encrypted import open_luks

        return open_luks(view, luks_secret(ref, secrets))
    except BaseException:
        file.close()
        raise


def _lock(file: FileStorage, view: Storage, ref: ImageRef, writable: bool, force_share: bool) -> None:
    """Lock a file that the engine sees only through others, as the engine would."""
    from qcowlib.chain import probe_format

    access = "force_share" if force_share else "write" if writable else "read"
    reserve = (ref.format or probe_format(view)) != "raw"
    lock_image(file.fileno(), file.name, access, reserve=reserve)  # type: ignore[arg-type]


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
    from qcowlib.gate import name_of
    from qcowlib.image import open as open_any

    policy = references()
    fmt = header.backing_format.decode("utf-8", "surrogateescape") if header.backing_format else None
    try:
        named = name_of(policy, header.backing_file.decode("utf-8", "surrogateescape"), ref.path)
        storage = policy.open("backing", named.path, ref.path, writable=False, cache="writeback")
        open_any(storage, format=fmt or named.format, references=policy).close()
    except Error as error:
        error.message = f"Could not open backing file: {error.message}"
        raise open_failure(ref.text, error) from None
