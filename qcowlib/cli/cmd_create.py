# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``create``: make a new image.

Invariant: the ``Formatting`` line comes before anything is created, and a
creation that fails afterwards leaves no file behind.
"""

from __future__ import annotations

from qcowlib.cli import creation, options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.optlist import OptionList, create_help, create_table, help_wanted
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.values import size_option

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "create",
    "Make a new image.",
    "FILE [SIZE]",
    (
        options.HELP,
        options.OBJECT,
        options.QUIET,
        Option("f", "", "format", "format of the new image (default: raw)", meta="FMT"),
        Option("b", "", "backing", "the image this one is based on", meta="BACKING"),
        Option("F", "", "backing-format", "format of the backing file", meta="FMT"),
        Option("u", "", "unsafe", "do not open the backing file"),
        options.list_option(),
        options.OUTPUT_EXTRA,
    ),
    "create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``create``."""
    fmt = args.text("format") or "raw"
    name = args.operands[0] if args.operands else None
    lists = args.texts("options")
    if help_wanted(lists):
        if not creation.can_create(fmt):
            raise creation.not_made(fmt)
        if name is not None:
            creation.protocol_path(name)
        console.out(create_help(fmt, name is not None))
        return 0
    if name is None:
        raise usage_failure("Expecting image file name")
    size = size_option("image size", args.operands[1], console) if len(args.operands) > 1 else None
    if len(args.operands) > 2:
        raise usage_failure(f"Unexpected argument: {args.operands[2]}")
    as_json = options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    try:
        request = _request(args, fmt, name, size, console)
        if not args.flag("quiet") and not as_json:
            console.out(f"Formatting '{name}', fmt={fmt}{request.values.show()}\n")
            console.flush()
        creation.create(request, secrets)
    except Failure as failure:
        failure.messages = tuple(f"{name}: {message}" for message in failure.messages)
        raise
    if as_json:
        console.out(pretty({"filename": name, "format": fmt, "virtual-size": request.size}))
    return 0


def _request(args: Args, fmt: str, name: str, size: int | None, console: Console) -> creation.Request:
    """Return what to create, after all checks that come before the ``Formatting`` line."""
    if not creation.can_create(fmt):
        raise creation.not_made(fmt)
    path = creation.protocol_path(name)
    values = OptionList(create_table(fmt))
    values.parse(args.texts("options"), console)
    if size is not None:
        if "size" in values:
            raise Failure("The image size must be specified only once")
        values.set("size", size)
    for option, key, what in (
        ("backing", "backing_file", "Backing file"),
        ("backing-format", "backing_fmt", "Backing file format"),
    ):
        text = args.text(option)
        if text is not None:
            if fmt != "qcow2":
                raise Failure(f"{what} not supported for file format '{fmt}'")
            values.set(key, text)
    backing = values.text("backing_file")
    if backing is not None:
        _check_backing_name(name, backing)
    request = creation.Request(fmt, name, path, values)
    if backing is not None:
        creation.resolve_backing(request, backing, unsafe=args.flag("unsafe"))
    total = values.number("size", creation.UNKNOWN_SIZE)
    if total == creation.UNKNOWN_SIZE:
        raise Failure("Image creation needs a size parameter")
    return request


def _check_backing_name(name: str, backing: str) -> None:
    if not backing:
        raise Failure("Expected backing file name, got empty string")
    if backing == name:
        raise Failure("Error: Trying to create an image with the same filename as the backing file")
