# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``rebase``: give an image another backing file.

Invariant: without ``-u`` the content of the image stays the same.
"""

from __future__ import annotations

from qcowlib.cli import creation, options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.names import ImageRef, image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import open_image
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.info import full_backing_name

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "rebase",
    "Give an image another backing file, keeping its content.",
    "FILE",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORCE_SHARE,
        options.QUIET,
        options.FORMAT,
        options.CACHE,
        options.SOURCE_CACHE,
        options.PROGRESS,
        options.PROGRESS_FORM,
        Option("u", "", "unsafe", "change the name only; the content may change"),
        Option("b", "", "backing", "the new backing file, or '' for none", meta="BACKING"),
        Option("F", "", "backing-format", "format of the new backing file", meta="FMT"),
        options.OUTPUT_EXTRA,
    ),
    "rebase -b new-base.qcow2 -F qcow2 overlay.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``rebase``."""
    if len(args.operands) != 1:
        raise usage_failure("Expecting one image file name")
    unsafe, backing, fmt = args.flag("unsafe"), args.text("backing"), args.text("backing-format")
    if not unsafe and backing is None:
        raise usage_failure("Must specify backing file (-b) or use unsafe mode (-u)")
    options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    cache = options.cache_mode(args)
    options.cache_mode(args, source=True)
    ref = options.single_image(args)
    with open_image(ref, console, secrets=secrets, writable=True, cache=cache, backing=not unsafe) as image:
        if fmt is not None and fmt not in creation.KNOWN_FORMATS:
            raise Failure(f"Invalid format name: '{fmt}'")
        if backing and not unsafe:
            _open_new_backing(backing, fmt, ref, console)
        if backing and fmt is None:
            raise Failure(f"Could not change the backing file to '{backing}': backing format must be specified")
        problem = "Operation not supported" if image.format == "raw" else "not supported yet"
        raise Failure(f"Could not change the backing file to '{backing}': {problem}")


def _open_new_backing(backing: str, fmt: str | None, owner: ImageRef, console: Console) -> None:
    name = full_backing_name(owner.path, backing)
    try:
        open_image(image_ref(name, fmt), console, secrets={}).close()
    except Failure as failure:
        text = failure.messages[0].removeprefix(f"Could not open '{name}': ")
        raise Failure(f"Could not open new backing file '{backing}': {text}", hint=failure.hint) from None
