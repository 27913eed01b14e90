# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Names of images: paths, ``file:``, ``json:{...}`` and ``--image-opts``.

Invariant: a name is parsed into a plain :class:`ImageRef` without touching any
file; what the tree of drivers cannot express here is refused with one line,
never ignored.  Supported trees: a format (qcow2, raw) over a file, with an
optional raw window (offset, size) between, and ``blkdebug`` before the file or
before the format.
"""

from __future__ import annotations

from qcowlib.cli.console import Failure
from qcowlib.cli.jsonout import compact
from qcowlib.cli.values import parse_bool, parse_size, split_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qcowlib.cli.jsonout import Json

    Tree = dict[str, "Tree | Leaf"]
    Leaf = None | bool | int | str

__all__ = ["FORMATS", "ImageRef", "Window", "has_protocol", "image_ref", "known_format"]

FORMATS = ("qcow2", "raw")
#: What an image can be opened as: a LUKS file reads as the raw image inside.
_OPENABLE = (*FORMATS, "luks")
_FILES = ("file", "host_device")

_COMMON_NAMES = (
    "driver node-name read-only auto-read-only force-share detect-zeroes discard "
    "cache.direct cache.no-flush cache.writeback"
)
_COMMON = frozenset(_COMMON_NAMES.split())
_FILE = frozenset(["filename", "locking", "aio", "x-check-cache-dropped", "drop-cache", "pr-manager", "aio-max-batch"])
_QCOW2_NAMES = (
    "lazy-refcounts pass-discard-request pass-discard-snapshot pass-discard-other overlap-check "
    "cache-size l2-cache-size l2-cache-entry-size refcount-cache-size cache-clean-interval encrypt.format "
    "encrypt.key-secret discard-no-unref"
)
_QCOW2 = frozenset(_QCOW2_NAMES.split())
_RAW = frozenset(("offset", "size"))
_KEYS = {"raw": _RAW, "qcow2": _QCOW2, "luks": frozenset(("key-secret",))}


class Window:
    """A raw layer that shows a part of its file; *size* None means up to the end."""

    __slots__ = ("offset", "size")

    def __init__(self, offset: int, size: int | None) -> None:
        self.offset = offset
        self.size = size


class ImageRef:
    """One image as named on the command line.

    *text* is the name as typed (messages quote it), *shown* the shortest name
    that opens the same image (``info`` prints it), *path* the file, *format*
    the format asked for or None to probe, *windows* the raw layers between
    format and file from the top down, *secret* the id of the passphrase,
    *backing* what was said of the backing file (its *path* empty: where the
    image says it is), *locking* whether others are kept off the file.  *debug*,
    *data_debug* and *above* are what was said of ``blkdebug`` before the file,
    the data file and the format.
    """

    __slots__ = (
        "above",
        "backing",
        "data_debug",
        "data_file",
        "debug",
        "format",
        "is_file",
        "locking",
        "path",
        "secret",
        "shown",
        "text",
        "windows",
    )

    def __init__(self, text: str, path: str, fmt: str | None) -> None:
        self.text = text
        self.path = path
        self.format = fmt
        self.shown = path
        self.windows: list[Window] = []
        self.secret: str | None = None
        self.data_file: str | None = None
        self.is_file = False
        self.locking = True
        self.backing: ImageRef | None = None
        self.debug: Tree | None = None
        self.data_debug: Tree | None = None
        self.above: Tree | None = None

    @property
    def plain_path(self) -> str:
        """The path, for who opens the file past :mod:`.opening`.  Raises :class:`Failure` behind ``blkdebug``."""
        if self.debug is not None or self.data_debug is not None or self.above is not None:
            raise _refused(self.text, "this command does not work through blkdebug")
        return self.path


def known_format(name: str) -> bool:
    """Return whether *name* is a format of ours."""
    return name in FORMATS


def image_ref(text: str, fmt: str | None, *, image_opts: bool = False, backing: bool = True) -> ImageRef:
    """Parse *text*.  Raises :class:`Failure` with the words of an open error.

    Without *backing* the backing file will not be opened, and nothing may be said of it.
    """
    if image_opts:
        if fmt is not None:
            raise Failure("--image-opts and --format are mutually exclusive")
        return _from_tree(text, _tree(_implied(text)), None, backing)
    if text.startswith("json:"):
        return _from_tree(text, _json_tree(text), fmt, backing)
    if fmt is not None and fmt not in _OPENABLE and fmt not in _FILES:
        raise _refused(text, f"Unknown driver '{fmt}'")
    if text.startswith("blkdebug:"):
        return _debugged(text, fmt)
    path = strip_protocol(text)
    ref = ImageRef(text, path, "raw" if fmt in _FILES else fmt)
    ref.is_file = fmt in _FILES
    return ref


def _debugged(text: str, fmt: str | None) -> ImageRef:
    """``blkdebug:CONFIG:PATH``, where the configuration may be empty."""
    config, colon, name = text[len("blkdebug:") :].partition(":")
    if not colon:
        raise _refused(text, "blkdebug requires both config file and image path")
    if not name:
        raise _refused(text, "The 'file' block driver requires a file name")
    ref = ImageRef(text, strip_protocol(name), "raw" if fmt in _FILES else fmt)
    ref.debug = {"config": config}
    ref.shown = f"blkdebug:{config}:{ref.path}"
    return ref


def has_protocol(text: str) -> bool:
    """Return whether *text* is more than a path: there is a colon before the first slash."""
    head, colon, _ = text.partition(":")
    return bool(head and colon) and "/" not in head


def strip_protocol(text: str) -> str:
    """Return the path of a plain name.  Raises :class:`Failure` for protocols that are not ours."""
    if not has_protocol(text):
        if not text:
            raise _refused(text, "The 'file' block driver requires a file name")
        return text
    protocol, _, path = text.partition(":")
    if protocol not in _FILES:
        raise _refused(text, f"Unknown protocol '{protocol}'")
    if not path:
        raise _refused(text, "The 'file' block driver requires a file name")
    # Source: so that the path alone is not taken for a protocol either.
    return f"./{path}" if has_protocol(path) else path


def _refused(text: str, cause: str) -> Failure:
    return Failure(f"Could not open '{text}': {cause}")


def _implied(text: str) -> list[tuple[str, Leaf]]:
    """Items of ``--image-opts``: the first may lack its key, which is then ``file``."""
    items: list[tuple[str, Leaf]] = []
    for index, (key, value) in enumerate(split_options(text)):
        if value is not None:
            items.append((key, value))
        elif index == 0:
            items.append(("file", key))
        elif key.startswith("no"):
            items.append((key[2:], "off"))
        else:
            items.append((key, "on"))
    return items


def _tree(items: Sequence[tuple[str, Leaf]]) -> Tree:
    """Nest dotted keys."""
    root: Tree = {}
    for key, value in items:
        node, parts = root, key.split(".")
        for part in parts[:-1]:
            child = node.get(part)
            if not isinstance(child, dict):
                child = {"": child} if part in node else {}
                node[part] = child
            node = child
        last = node.get(parts[-1])
        if isinstance(last, dict):
            last[""] = value
        else:
            node[parts[-1]] = value
    return root


def _json_tree(text: str) -> Tree:
    from qcowlib.cli.jsonin import JsonError, parse_json

    try:
        value = parse_json(text[5:])
    except JsonError as error:
        raise _refused(text, f"Could not parse the JSON options: {error}") from None
    if not isinstance(value, dict):
        raise _refused(text, "Invalid JSON object given")
    return _tree(_flatten(value, ""))


def _flatten(value: Mapping[str, object], prefix: str) -> list[tuple[str, Leaf]]:
    items: list[tuple[str, Leaf]] = []
    for key, item in value.items():
        if isinstance(item, list):
            item = {str(index): one for index, one in enumerate(item)}
        if isinstance(item, dict):
            items += _flatten(item, f"{prefix}{key}.")
        elif item is None or isinstance(item, (bool, int, str)):
            items.append((prefix + key, item))
        else:
            items.append((prefix + key, str(item)))
    return items


def _from_tree(text: str, root: Tree, fmt: str | None, backing: bool) -> ImageRef:
    driver = root.get("driver", fmt)
    if fmt is not None:
        driver = fmt if "driver" not in root or root["driver"] in _FILES else driver
        if root.get("driver") == "qcow2" and fmt == "raw":
            driver = "raw"
    if driver == "blkdebug":
        return _from_debugged(text, root, backing)
    if driver is None and "file" not in root:
        raise _refused(text, "Must specify either driver or file")
    if not (driver is None or isinstance(driver, str)) or (driver is not None and driver not in (*_OPENABLE, *_FILES)):
        raise _refused(text, f"Unknown driver '{driver}'")
    ref = ImageRef(text, "", None)
    if driver in _FILES:
        _set_file(ref, root)
        ref.format, ref.is_file = "raw", True
        ref.shown = ref.path
        return ref
    ref.format = driver
    _walk_files(ref, root)
    _check_keys(text, root, driver, backing)
    _format_options(ref, root)
    return ref


def _from_debugged(text: str, root: Tree, backing: bool) -> ImageRef:
    """A tree with ``blkdebug`` on top: over a file, which is raw then, or over a format."""
    image = _debugged_image(text, root)
    if image.get("driver", "file") not in _FILES:
        ref = _from_tree(text, image, None, backing)
        if ref.debug is not None or ref.above is not None:
            raise _refused(text, "Driver 'blkdebug' cannot be used here")
        ref.above = root
        return ref
    ref = ImageRef(text, "", "raw")
    _set_debugged(ref, root)
    return ref


def _debugged_image(text: str, node: Tree) -> Tree:
    image = node.get("image")
    if image is None:
        raise _refused(text, 'A block device must be specified for "image"')
    if not isinstance(image, dict):
        raise _refused(text, f"Cannot find device='{image}' nor node-name='{image}'")
    return image


def _set_debugged(ref: ImageRef, node: Tree) -> None:
    image = _debugged_image(ref.text, node)
    if image.get("driver", "file") not in _FILES:
        raise _refused(ref.text, f"Driver '{image['driver']}' cannot be used here")
    _set_file(ref, image)
    ref.debug = node
    ref.shown = f"blkdebug:{node.get('config') or ''}:{ref.path}"


def _walk_files(ref: ImageRef, root: Tree) -> None:
    """Follow ``file`` down to the file itself, collecting windows."""
    node: Tree = root
    simple = True
    if root.get("driver") == "raw" and ("offset" in root or "size" in root):
        ref.windows.append(_window(ref.text, root))
        simple = False
    while True:
        child = node.get("file")
        if not isinstance(child, dict):
            if child is None:
                raise _refused(ref.text, 'A block device must be specified for "file"')
            raise _refused(ref.text, f"Cannot find device='{child}' nor node-name='{child}'")
        if "" in child:
            raise _refused(
                ref.text, "Cannot reference an existing block device with additional options or a new filename"
            )
        driver = child.get("driver", "file")
        if driver in _FILES:
            _set_file(ref, child)
            break
        if driver == "blkdebug":
            _set_debugged(ref, child)
            if simple and not set(child) - {"driver", "image", "config"}:
                return
            simple = False
            break
        if driver != "raw":
            known = isinstance(driver, str) and driver in FORMATS
            raise _refused(
                ref.text, f"Driver '{driver}' cannot be used here" if known else f"Unknown driver '{driver}'"
            )
        _check_keys(ref.text, child, "raw")
        ref.windows.append(_window(ref.text, child))
        simple, node = False, child
    ref.shown = ref.path if simple else "json:" + compact(_visible(root))


def _visible(node: Tree) -> Json:
    """Return the tree with what names the image: drivers, files, windows."""
    keep: dict[str, Json] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            if key in ("inject-error", "set-state"):
                keep[key] = dict(value)
            elif key == "image":
                keep[key] = _visible(value)
            elif key == "file":
                keep[key] = _visible({"driver": "file", **value} if "driver" not in value else value)
            elif key == "encrypt":
                keep.update((f"encrypt.{name}", item) for name, item in _leaves(value) if name != "format")
        elif key in ("driver", "filename", "offset", "size", "key-secret", "config"):
            keep[key] = value
    return keep


def _window(text: str, node: Tree) -> Window:
    numbers: list[int | None] = []
    for key in ("offset", "size"):
        value = node.get(key)
        number = value if isinstance(value, int) else None
        if isinstance(value, str):
            number = parse_size(value)
        if value is not None and (number is None or not 0 <= number < 1 << 63):
            raise _refused(text, f"Parameter '{key}' expects a non-negative number below 2^64")
        numbers.append(number)
    offset, size = numbers
    if size is not None and size % 512:
        raise _refused(text, "Specified size is not multiple of 512")
    return Window(offset or 0, size)


def _set_file(ref: ImageRef, node: Tree) -> None:
    ref.path = _file_name(ref.text, node)
    locking = node.get("locking", "auto")
    if isinstance(locking, str) and locking not in ("auto", "on", "off"):
        raise _refused(ref.text, f"invalid parameter value: {locking}")
    ref.locking = locking not in ("off", False)


def _file_name(text: str, node: Tree) -> str:
    for key in node:
        if key not in _FILE and key not in _COMMON and key != "cache":
            raise _refused(text, f"Block protocol 'file' doesn't support the option '{key}'")
    name = node.get("filename")
    if not isinstance(name, str) or not name:
        raise _refused(text, "The 'file' block driver requires a file name")
    return name


def _check_keys(text: str, node: Tree, driver: str | None, backing: bool = False) -> None:
    """Refuse keys that a format does not know."""
    known = _KEYS.get(driver or "", _QCOW2 | _RAW)
    for key, _ in _leaves(node):
        if key.startswith("file.") or key == "file" or key in known or key in _COMMON:
            continue
        if driver in ("qcow2", None) and key.startswith(("data-file.", "backing.") if backing else "data-file."):
            continue
        raise _refused(text, f"Block format '{driver or 'raw'}' does not support the option '{key}'")
    for key in ("read-only", "force-share", "auto-read-only"):
        given = node.get(key)
        if isinstance(given, str):
            try:
                parse_bool(key, given)
            except Failure as failure:
                raise _refused(text, failure.messages[0]) from None
    if node.get("discard", "unmap") not in ("ignore", "off", "unmap", "on"):
        raise _refused(text, "Invalid discard option")


def _leaves(node: Tree, prefix: str = "") -> list[tuple[str, Leaf]]:
    found: list[tuple[str, Leaf]] = []
    for key, value in node.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found


def _format_options(ref: ImageRef, root: Tree) -> None:
    encrypt = root if ref.format == "luks" else root.get("encrypt")
    if isinstance(encrypt, dict):
        secret = encrypt.get("key-secret")
        ref.secret = secret if isinstance(secret, str) else None
    if isinstance(encrypt, dict) and (ref.secret is not None or (ref.format != "luks" and set(encrypt) - {"format"})):
        ref.shown = "json:" + compact(_visible({"driver": "qcow2", **root}))
    backing = root.get("backing")
    if isinstance(backing, dict):
        ref.backing = _backing(ref.text, backing)
    data_file = root.get("data-file")
    if isinstance(data_file, dict) and data_file.get("driver") == "blkdebug":
        ref.data_debug = data_file
        data_file = _debugged_image(ref.text, data_file)
    if isinstance(data_file, dict):
        ref.data_file = _file_name(ref.text, data_file)


def _backing(text: str, root: Tree) -> ImageRef:
    """Return what is said of a backing file: driver, file and keys, each of which may be missing."""
    driver = root.get("driver")
    if driver is not None and driver not in _OPENABLE:
        raise _refused(text, f"Could not open backing file: Unknown driver '{driver}'")
    ref = ImageRef(text, "", driver if isinstance(driver, str) else None)
    if "file" in root:
        _walk_files(ref, root)
        if ref.debug is not None:
            raise _refused(text, "Could not open backing file: Driver 'blkdebug' cannot be used here")
        if ref.windows:
            raise _refused(text, "Could not open backing file: a part of a file cannot be used here")
    known = {"driver", "key-secret", "encrypt.key-secret", "encrypt.format"}
    for key, _ in _leaves(root):
        if key not in known and not key.startswith(("file.", "backing.")):
            raise _refused(text, f"Could not open backing file: Block format does not support the option '{key}'")
    keys = root.get("encrypt")
    secret = (keys if isinstance(keys, dict) else root).get("key-secret")
    ref.secret = secret if isinstance(secret, str) else None
    below = root.get("backing")
    if isinstance(below, dict):
        if "driver" in below:
            raise _refused(text, "Could not open backing file: only the first backing file takes a driver")
        ref.backing = _backing(text, below)
    return ref
