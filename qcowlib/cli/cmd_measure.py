# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``measure``: how large a new image would be.

Invariant: nothing is written.
"""

from __future__ import annotations

from qcowlib.cli import creation, options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import open_image
from qcowlib.cli.optlist import OptionList, create_table
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.values import size_option

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "measure",
    "Tell how large a new image of a size, or with the content of an image, would be.",
    "[FILE]",
    (
        options.HELP,
        options.IMAGE_OPTS,
        options.OBJECT,
        options.OUTPUT,
        Option(
            "",
            "size",
            "size",
            "virtual size of an empty image",
            meta="SIZE",
            convert=lambda text, console: size_option("image size", text, console),
        ),
        options.FORCE_SHARE,
        options.FORMAT,
        Option("O", "", "target-format", "format of the new image (default: raw)", meta="FMT"),
        options.list_option(),
        Option("l", "", "snapshot", "the content of this snapshot", meta="SNAPSHOT"),
    ),
    "measure -O qcow2 disk.raw",
    getopt_style=True,
)


def run(args: Args, console: Console) -> int:
    """Run ``measure``."""
    as_json = options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    size, name = args.number("size"), args.operands[0] if args.operands else None
    if len(args.operands) > 1:
        raise Failure("At most one filename argument is allowed.")
    if name is None and (args.flag("image-opts") or args.flag("format") or args.flag("snapshot")):
        raise Failure("--image-opts, -f, and -l require a filename argument.")
    if name is None and size is None:
        raise Failure("Either --size N or one filename must be specified.")
    if name is not None and size is not None:
        raise Failure("--size N cannot be used together with a filename.")
    fmt = args.text("target-format") or "raw"
    if name is not None:
        ref = image_ref(name, args.text("format"), image_opts=args.flag("image-opts"))
        with open_image(ref, console, secrets=secrets, force_share=args.flag("force-share")) as image:
            size = image.size
    if not creation.can_create(fmt):
        raise Failure(f"Unknown file format '{fmt}'")
    if fmt == "file":
        raise Failure("Block driver 'file' does not support size measurement")
    values = OptionList(create_table(fmt))
    try:
        values.parse(args.texts("options"), console)
    except Failure as failure:
        console.fail(failure)
        raise Failure(f"Invalid options for file format '{fmt}'") from None
    if fmt != "raw":
        raise Failure(f"Measuring '{fmt}' is not supported yet")
    total = -(-(size or 0) // 512) * 512
    if as_json:
        console.out(pretty({"required": total, "fully-allocated": total}))
    else:
        console.out(f"required size: {total}\nfully allocated size: {total}\n")
    return 0
