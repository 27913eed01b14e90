# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``bitmap``: make, change and delete persistent bitmaps.

Invariant: the actions run in the order given; the backing chain is not opened.
"""

from __future__ import annotations

from contextlib import ExitStack

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, open_image
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.values import size_option
from qcowlib.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.image import Image

__all__ = ["COMMAND", "run"]

_ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")


def _granularity(text: str, console: Console) -> int:
    return size_option("granularity", text, console)


COMMAND = Command(
    "bitmap",
    "Make, change or delete a persistent bitmap.",
    "FILE BITMAP",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORMAT,
        Option("", "add", "add", "make the bitmap"),
        Option("", "remove", "remove", "delete the bitmap"),
        Option("", "clear", "clear", "forget what the bitmap recorded"),
        Option("", "enable", "enable", "start recording"),
        Option("", "disable", "disable", "stop recording"),
        Option("", "merge", "merge", "add what another bitmap recorded", meta="SOURCE"),
        Option("g", "granularity", "granularity", "bytes of one bit (with --add)", meta="SIZE", convert=_granularity),
        Option("b", "source-file", "source-file", "image of the bitmap to merge", meta="FILE"),
        Option("F", "source-format", "source-format", "format of that image", meta="FMT"),
        options.OUTPUT_EXTRA,
    ),
    "bitmap --add -g 64k disk.qcow2 backup",
)


def run(args: Args, console: Console) -> int:
    """Run ``bitmap``."""
    actions = [(name, text) for name, text in args.actions if name in _ACTIONS]
    granularity = args.number("granularity")
    source, source_format = args.text("source-file"), args.text("source-format")
    options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    if not actions:
        raise Failure("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
    names = [name for name, _ in actions]
    if granularity is not None and "add" not in names:
        raise Failure("granularity only supported with --add")
    if source_format is not None and source is None:
        raise Failure("-F only supported with -b")
    if source is not None and "merge" not in names:
        raise Failure("Merge bitmap source file only supported with --merge")
    if len(args.operands) != 2:
        raise Failure("Expecting filename and bitmap name")
    ref = image_ref(args.operands[0], args.text("format"), image_opts=args.flag("image-opts"))
    bitmap = args.operands[1]
    with ExitStack() as stack:
        image = stack.enter_context(open_image(ref, console, secrets=secrets, writable=True, backing=False))
        other = None
        if source is not None:
            other = stack.enter_context(
                open_image(image_ref(source, source_format), console, secrets=secrets, backing=False)
            )
        for action in actions:
            _act(image, action, bitmap, granularity, other)
    return 0


def _act(image: Image, action: tuple[str, str], bitmap: str, granularity: int | None, other: Image | None) -> None:
    """Carry out one action.  Raises :class:`Failure`."""
    name, text = action
    if image.format == "raw":
        raise Failure(f"Operation {name} on bitmap {bitmap} failed: {_raw(name, bitmap)}")
    try:
        if name == "add":
            image.add_bitmap(bitmap, granularity)
        elif name == "merge":
            image.merge_bitmap(bitmap, text, other)
        else:
            getattr(image, f"{name}_bitmap")(bitmap)
    except Error as error:
        # Source: qemu-img names a node of its block graph where we name the file.
        cause = error.message.replace(f" persistent in '{error.path}': ", " persistent in '#block000': ")
        raise Failure(f"Operation {name} on bitmap {bitmap} failed: {cause}", hint=hint_text(error)) from None


def _raw(name: str, bitmap: str) -> str:
    if name == "add":
        return "Can't store persistent bitmaps to #block000: Operation not supported"
    return f"Dirty bitmap '{bitmap}' not found"
