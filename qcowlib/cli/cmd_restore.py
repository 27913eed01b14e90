# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``restore``: apply one increment of a backup to an image that holds the state before.

Invariant: cut off, the command is finished by running it again; with ``--plan``
nothing is written.
"""

from __future__ import annotations

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, open_image
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error
from qcowlib.units import human_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.cli.jsonout import Json
    from qcowlib.image import Image

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "restore",
    "Write what one increment of a backup holds into an image that holds the backup before.",
    "INCREMENT FILE",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        options.FORMAT,
        Option("F", "", "format2", "format of the image to write to (default: probed)", meta="FMT"),
        Option("", "plan", "plan", "only say how much would be written"),
        options.CACHE,
        options.SOURCE_CACHE,
        options.RATE,
        options.OUTPUT,
    ),
    "restore monday.qcow2 disk.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``restore``."""
    if len(args.operands) != 2:
        raise Failure("Expecting an increment and the image to write to")
    as_json = options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    image_opts, quiet = args.flag("image-opts"), args.flag("quiet")
    refs = [
        image_ref(name, args.text(fmt), image_opts=image_opts)
        for name, fmt in zip(args.operands, ("format", "format2"), strict=True)
    ]
    caches = [options.cache_mode(args, source=True), options.cache_mode(args)]
    plan = args.flag("plan")
    with (
        open_image(refs[0], console, secrets=secrets, backing=False, cache=caches[0]) as increment,
        open_image(refs[1], console, secrets=secrets, writable=not plan, cache=caches[1]) as target,
    ):
        from qcowlib.jobs.backup import restore

        if plan:
            _plan(increment, target, args.operands[1], console, as_json=as_json)
            return 0

        size = increment.size
        progress = Progress(console, args.flag("progress") and not quiet, total=size, form=options.progress_form(args))
        progress.report(0)
        try:
            restore(increment, target, progress=progress.within(), rate=args.number("rate") or None)
            progress.report(100)
        except Error as error:
            raise Failure(str(error), hint=hint_text(error)) from None
        finally:
            progress.end()
    if as_json:
        console.out(pretty({"filename": args.operands[1], "virtual-size": size}))
    elif not quiet:
        console.out("Increment restored.\n")
    return 0


def _plan(increment: Image, target: Image, name: str, console: Console, *, as_json: bool) -> None:
    from qcowlib.jobs.backup import plan_restore

    try:
        found = plan_restore(increment, target)
    except Error as error:
        raise Failure(str(error), hint=hint_text(error)) from None
    if as_json:
        sizes: dict[str, Json] = {"virtual-size": found.size, "virtual-size-before": found.size_before}
        console.out(pretty({"filename": name, "data": found.data, "zeros": found.zeros, **sizes}))
        return
    resized = f", resized from {found.size_before} to {found.size} bytes" if found.size != found.size_before else ""
    console.out(f"{human_size(found.data)} of data and {human_size(found.zeros)} of zeros to {name}{resized}\n")
