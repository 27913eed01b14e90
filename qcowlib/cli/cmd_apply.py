# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``apply``: make the changes of a stream that ``diff`` wrote.

Invariant: what a stream says is checked before it is done; with ``--overlay``
and with ``--plan`` the image itself is not changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, open_image, references
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error, printable
from qcowlib.units import human_size

if TYPE_CHECKING:
    from io import FileIO

    from qcowlib.jobs.diff_stream import Applied

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "apply",
    "Make the changes of a stream that diff wrote.",
    "FILE [STREAM]",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORMAT,
        options.CACHE,
        Option("", "overlay", "overlay", "to a new overlay of this name over FILE, all or none", meta="FILE"),
        Option("", "no-check", "no-check", "do not ask whether FILE is what the stream began from"),
        Option("", "plan", "plan", "only check the stream and say what is in it"),
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        options.RATE,
        options.OUTPUT,
    ),
    "apply old.qcow2 changes.diff",
)


def run(args: Args, console: Console) -> int:
    """Run ``apply``."""
    as_json = options.wants_json(args)
    least = 0 if args.flag("plan") else 1
    if not least <= len(args.operands) <= 2:
        raise usage_failure("Expecting an image file name and the name of a stream")
    if args.flag("overlay") and args.text("format") is None:
        raise Failure("-f FMT is needed: an overlay stores the format of what it stands on")
    name = args.operands[-1] if len(args.operands) == 2 or (args.flag("plan") and args.operands) else "-"
    try:
        with open(0 if name == "-" else name, "rb", buffering=0, closefd=name != "-") as stream:
            made = _run(args, stream, console)
    except Error as error:
        raise Failure(str(error), hint=hint_text(error)) from None
    except OSError as error:
        raise Failure(f"Could not read '{name}': {error.strerror}") from None
    except ValueError as error:
        raise Failure(f"Could not read '{printable(name)}': {error}") from None
    if as_json:
        console.out(pretty({"records": made.records, "data": made.data, "zeros": made.zeros}))
    elif not args.flag("quiet"):
        console.out(f"{made.records} records: {human_size(made.data)} of data, {human_size(made.zeros)} of zeros\n")
    return 0


def _run(args: Args, stream: FileIO, console: Console) -> Applied:
    from qcowlib.jobs.diff_stream import apply, read_diff

    if args.flag("plan"):
        return read_diff(stream)
    progress = Progress(console, args.flag("progress") and not args.flag("quiet"), form=options.progress_form(args))
    progress.report(0)
    check, rate = not args.flag("no-check"), args.number("rate") or None
    secrets = parse_secrets(args.texts("object"))
    ref = image_ref(args.operands[0], args.text("format"), image_opts=args.flag("image-opts"))
    cache = options.cache_mode(args)
    try:
        if args.text("overlay") is not None:
            return apply(
                stream,
                ref.plain_path,
                format=args.text("format"),
                overlay=args.text("overlay"),
                check=check,
                references=references(),
                progress=progress.within(),
                rate=rate,
            )
        with open_image(ref, console, secrets=secrets, writable=True, cache=cache) as image:
            return apply(stream, image, check=check, progress=progress.within(), rate=rate)
    finally:
        progress.end()
