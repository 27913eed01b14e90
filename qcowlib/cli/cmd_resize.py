# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``resize``: change the virtual size of an image.

Invariant: bytes are lost only with ``--shrink``.
"""

from __future__ import annotations

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, open_image
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.values import list_size
from qcowlib.errors import Error, StorageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.image import Image
    from qcowlib.qcow2.create import Preallocation

__all__ = ["COMMAND", "run"]

_MODES: dict[str, Preallocation] = {"off": "off", "metadata": "metadata", "falloc": "falloc", "full": "full"}

_SHRINKS = (
    "warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an "
    "operation, make sure there is no important data there."
)


def _mode(text: str, _console: Console) -> str:
    if text not in _MODES:
        raise Failure(f"Invalid preallocation mode '{text}'")
    return text


COMMAND = Command(
    "resize",
    "Change the virtual size of an image, to SIZE or by +SIZE or -SIZE.",
    "FILE [+|-]SIZE",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORMAT,
        Option(
            "",
            "preallocation",
            "preallocation",
            "off, metadata, falloc or full for the new bytes",
            meta="MODE",
            convert=_mode,
        ),
        options.QUIET,
        Option("", "shrink", "shrink", "allow to lose the bytes behind the new end"),
        options.OUTPUT_EXTRA,
    ),
    "resize disk.qcow2 +10G",
)


def run(args: Args, console: Console) -> int:
    """Run ``resize``; the size is the last operand, whatever it looks like."""
    text = args.operands.pop()
    if len(args.operands) != 1:
        raise usage_failure("Expecting image file name and size")
    as_json = options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    sign = {"+": 1, "-": -1}.get(text[:1], 0)
    size = list_size("size", text[1:] if sign else text, console)
    size = size - (1 << 64) if size >> 63 else size
    mode = _MODES[args.text("preallocation") or "off"]
    ref = image_ref(args.operands[0], args.text("format"), image_opts=args.flag("image-opts"))
    with open_image(ref, console, secrets=secrets, writable=True) as image:
        total = image.size + sign * size if sign else size
        _check(image.size, total, mode, args.flag("shrink"))
        _resize(image, total, mode, args.flag("shrink"), sparse=not console.prog.startswith("qemu-img"))
        if as_json:
            console.out(pretty({"filename": ref.text, "virtual-size": image.size}))
        elif not args.flag("quiet"):
            console.out("Image resized.\n")
    return 0


def _check(current: int, total: int, mode: Preallocation, shrink: bool) -> None:
    if not 0 < total < 1 << 63:
        raise Failure("New image size must be positive")
    if total <= current and mode != "off":
        raise Failure("Preallocation can only be used for growing images")
    if total < current and not shrink:
        raise Failure("Use the --shrink option to perform a shrink operation.", _SHRINKS)


def _resize(image: Image, total: int, mode: Preallocation, shrink: bool, *, sparse: bool) -> None:
    if image.format == "raw" and mode == "metadata":
        raise Failure("Unsupported preallocation mode: metadata")
    try:
        image.resize(total, preallocation=mode, shrink=shrink, sparse=sparse)
    except StorageError as error:
        text = f"Could not resize file: {error.strerror}" if image.format == "raw" else error.message
        raise Failure(text, hint=hint_text(error)) from None
    except Error as error:
        raise Failure(error.message, hint=hint_text(error)) from None
