# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``diff``: what differs between two images, two snapshots, or since a bitmap began.

Invariant: neither side is changed; what is begun and fails is removed, but for
a stream, which then has no end that ``apply`` would take.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from qcowlib.cli import creation, options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import compact, pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, open_image, references
from qcowlib.cli.optlist import OptionList, create_table
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.cli.values import size_option
from qcowlib.errors import Error, printable
from qcowlib.units import human_size

if TYPE_CHECKING:
    from qcowlib.image import Image
    from qcowlib.jobs.diff import Change

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "diff",
    "Tell what differs between two images, two snapshots, or since a bitmap began; as a list, an overlay or a stream.",
    "[OLD] NEW",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORCE_SHARE,
        options.FORMAT,
        Option("F", "", "format2", "format of NEW (default: probed)", meta="FMT"),
        Option("", "old-snapshot", "old-snapshot", "the old side is this snapshot (of NEW if alone)", meta="NAME"),
        Option("", "new-snapshot", "new-snapshot", "the new side is this snapshot of NEW", meta="NAME"),
        Option("", "bitmap", "bitmap", "what this bitmap of NEW has recorded", meta="BITMAP"),
        Option("", "fast", "fast", "look at the maps only: what may differ counts"),
        Option(
            "",
            "unit",
            "unit",
            "in units of so many bytes, 512 to 1M (default: 4k)",
            meta="SIZE",
            convert=lambda text, console: size_option("unit", text, console),
        ),
        Option("", "stream", "stream", "write a stream for apply to FILE (-: standard output)", meta="FILE"),
        Option("", "overlay", "overlay", "write an overlay over OLD", meta="FILE"),
        Option("b", "", "backing", "what the overlay stands on, as stored (default: OLD)", meta="BACKING"),
        Option("c", "", "compress", "compress the overlay"),
        options.list_option(),
        Option("", "plan", "plan", "only say how much there is"),
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        options.RATE,
        options.OUTPUT,
    ),
    "diff base.qcow2 disk.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``diff``."""
    as_json = options.wants_json(args)
    _check(args, console)
    secrets = parse_secrets(args.texts("object"))
    with ExitStack() as stack:

        def opened(name: str, format: str | None, snapshot: str | None) -> Image:
            ref = image_ref(name, format, image_opts=args.flag("image-opts"))
            image = open_image(ref, console, secrets=secrets, force_share=args.flag("force-share"), snapshot=snapshot)
            return stack.enter_context(image)

        newest = args.operands[-1]
        formats = args.text("format"), args.text("format2")
        new = opened(newest, formats[1] if len(args.operands) > 1 else formats[0], args.text("new-snapshot"))
        old = None
        if not args.flag("bitmap"):
            old = opened(args.operands[0], formats[0], args.text("old-snapshot"))
        progress = Progress(
            console,
            args.flag("progress") and not args.flag("quiet"),
            total=new.size,
            form=options.progress_form(args),
        )
        progress.report(0)
        try:
            _answer(args, old, new, progress, console, as_json=as_json)
            progress.report(100)
        except Error as error:
            raise Failure(str(error), hint=hint_text(error)) from None
        finally:
            progress.end()
    return 0


def _check(args: Args, console: Console) -> None:
    """Refuse lines that make no sense.  Raises :class:`Failure`."""
    count = len(args.operands)
    same = any(args.flag(name) for name in ("bitmap", "old-snapshot", "new-snapshot"))
    if count not in (1, 2) or (count == 1 and not same) or (count == 2 and args.flag("bitmap")):
        raise usage_failure("Expecting two image file names, or one with --bitmap or a snapshot")
    if args.flag("bitmap") and (args.flag("old-snapshot") or args.flag("new-snapshot")):
        raise Failure("--bitmap and snapshots cannot be used together")
    if args.flag("stream") and args.flag("overlay"):
        raise Failure("--stream and --overlay cannot be used together")
    if not args.flag("overlay") and (args.flag("backing") or args.flag("compress") or args.texts("options")):
        raise Failure("-b, -c and -o are for --overlay")
    if args.text("stream") == "-" and console.stdout_is_tty:
        raise Failure("a stream is not for a terminal")
    if args.text("stream") == "-" and options.wants_json(args):
        raise Failure("standard output takes the stream or JSON, not both")


def _answer(args: Args, old: Image | None, new: Image, progress: Progress, console: Console, *, as_json: bool) -> None:
    from qcowlib.jobs.diff import DEFAULT_UNIT, diff

    unit = args.number("unit") or DEFAULT_UNIT
    rate = args.number("rate") or None
    plan = args.flag("plan")
    if args.flag("stream") and not plan:
        _stream(args, old, new, unit, progress, console, as_json=as_json)
        return
    if args.flag("overlay") and not plan:
        _overlay(args, old, new, progress, console, as_json=as_json)
        return
    found = diff(
        old,
        new,
        bitmap=args.text("bitmap"),
        exact=not args.flag("fast"),
        unit=unit,
        progress=progress.within(),
        rate=rate,
    )
    if plan:
        _summary(found, console, as_json=as_json)
    elif as_json:
        lines = [compact({"start": start, "length": length, "zero": zero}) for start, length, zero in found]
        console.out("[" + ",\n ".join(lines) + "]\n")
    elif not args.flag("quiet"):
        console.out(f"{'Offset':<16}{'Length':<16}Content\n")
        for start, length, zero in found:
            console.out(f"{start:<#16x}{length:<#16x}{'zeros' if zero else 'data'}\n")


def _summary(found: list[Change], console: Console, *, as_json: bool) -> None:
    data = sum(change.length for change in found if not change.zero)
    zeros = sum(change.length for change in found if change.zero)
    if as_json:
        console.out(pretty({"ranges": len(found), "data": data, "zeros": zeros}))
    else:
        console.out(f"{len(found)} ranges: {human_size(data)} of data, {human_size(zeros)} of zeros\n")


def _stream(
    args: Args, old: Image | None, new: Image, unit: int, progress: Progress, console: Console, *, as_json: bool
) -> None:
    from qcowlib.jobs.diff_stream import write_diff

    name = args.text("stream") or ""
    console.flush()
    try:
        with open(1 if name == "-" else name, "wb", buffering=0, closefd=name != "-") as output:
            made = write_diff(
                old,
                new,
                output,
                bitmap=args.text("bitmap"),
                exact=not args.flag("fast"),
                unit=unit,
                progress=progress.within(),
                rate=args.number("rate") or None,
            )
            if name != "-" and not output.isatty():
                os.fsync(output.fileno())
    except BrokenPipeError:
        raise Failure("nobody takes the stream any more") from None
    except OSError as error:
        if isinstance(error, Error):
            raise
        raise Failure(f"Could not write '{name}': {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, Error):
            raise
        raise Failure(f"Could not write '{printable(name)}': {error}") from None
    if as_json:
        console.out(pretty({"filename": name, "records": made.records, "data": made.data, "zeros": made.zeros}))
    elif name != "-" and not args.flag("quiet"):
        console.out(f"{made.records} records: {human_size(made.data)} of data, {human_size(made.zeros)} of zeros\n")


def _overlay(args: Args, old: Image | None, new: Image, progress: Progress, console: Console, *, as_json: bool) -> None:
    from qcowlib.jobs.diff import diff_overlay

    if args.text("backing") is None and len(args.operands) != 2:
        raise Failure("-b BACKING is needed: the old side is no file of its own")
    values = OptionList(create_table("qcow2"))
    values.parse(args.texts("options"), console)
    target, backing = args.text("overlay") or "", args.text("backing") or args.operands[0]
    kept = args.text("format") or (old.format if old is not None else "qcow2")
    changed = diff_overlay(
        old,
        new,
        creation.protocol_path(target),
        backing=backing,
        backing_format=kept,
        compress=args.flag("compress"),
        bitmap=args.text("bitmap"),
        exact=not args.flag("fast"),
        references=references(),
        progress=progress.within(),
        rate=args.number("rate") or None,
        **creation.job_options(values),
    )
    if as_json:
        console.out(pretty({"filename": target, "backing-filename": backing, "stored": changed}))
    elif not args.flag("quiet"):
        console.out(f"{human_size(changed)} in {target} over {backing}\n")
