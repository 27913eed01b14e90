# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``amend``: change format options of an image.

Invariant: all options are understood before the image is opened for writing.
"""

from __future__ import annotations

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import open_image
from qcowlib.cli.optlist import OptionList, amend_help, amend_table, create_table, help_wanted
from qcowlib.cli.parser import Args, Command, Option

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "amend",
    "Change format options of an image.",
    "FILE",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        options.FORMAT,
        options.CACHE,
        Option("", "force", "force", "allow unsafe changes of key slots"),
        options.list_option(),
        options.OUTPUT_EXTRA,
    ),
    "amend -o compat=1.1,lazy_refcounts=on disk.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``amend``."""
    lists = args.texts("options")
    if not lists:
        raise usage_failure("Must specify options (-o)")
    options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    fmt = args.text("format")
    if fmt is not None and help_wanted(lists):
        return _help(fmt, console)
    if len(args.operands) != 1:
        raise Failure("Expecting one image file name")
    cache = options.cache_mode(args)
    ref = image_ref(args.operands[0], fmt, image_opts=args.flag("image-opts"))
    with open_image(ref, console, secrets=secrets, writable=True, cache=cache) as image:
        if help_wanted(lists):
            return _help(image.format, console)
        if image.format != "qcow2":
            raise _unsupported(image.format)
        values = _values(lists, console)
        raise Failure(f"Changing{values.show()} is not supported yet")


def _unsupported(fmt: str) -> Failure:
    return Failure(f"Format driver '{fmt}' does not support option amendment")


def _help(fmt: str, console: Console) -> int:
    if fmt != "qcow2":
        raise _unsupported(fmt) if fmt in ("raw", "file") else Failure(f"Unknown file format '{fmt}'")
    console.out(amend_help())
    return 0


def _values(lists: list[str], console: Console) -> OptionList:
    values = OptionList(amend_table())
    try:
        values.parse(lists, console)
    except Failure as failure:
        text = failure.messages[0]
        known = {f"Invalid parameter '{option.name}'" for option in create_table("qcow2")}
        if text in known:
            raise Failure(text, hint="This option is only supported for image creation\n") from None
        raise
    return values
