# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``compact``: give space back in place.

Invariant: with ``--plan`` nothing is changed or locked.
"""

from __future__ import annotations

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, secret_of
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error, printable

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "compact",
    "Move the tail of a qcow2 file into free clusters and cut it, in place.",
    "FILE",
    (
        options.HELP,
        options.QUIET,
        options.OBJECT,
        options.FORMAT,
        options.IMAGE_OPTS,
        options.CACHE,
        Option("", "zeros", "zeros", "free clusters that hold zeros only, too"),
        Option("", "plan", "plan", "say what would be done, to the byte; change nothing"),
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.RATE,
        options.OUTPUT_EXTRA,
    ),
    "compact --zeros disk.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``compact``."""
    from qcowlib.jobs.compact import compact, plan_compact

    ref = options.single_image(args)
    as_json = options.wants_json(args)
    if ref.format not in (None, "qcow2") or ref.windows:
        raise Failure("only qcow2 files can be compacted")
    secret = secret_of(ref, parse_secrets(args.texts("object")))
    only, zeros = args.flag("plan"), args.flag("zeros")
    progress = Progress(
        console, args.flag("progress") and not args.flag("quiet"), total=0, form=options.progress_form(args)
    )
    if not only:
        progress.report(0)
    try:
        done = (
            plan_compact(ref.plain_path, zeros=zeros, secret=secret)
            if only
            else compact(
                ref.plain_path,
                zeros=zeros,
                secret=secret,
                cache=options.cache_mode(args),  # type: ignore[arg-type]
                progress=progress.within(),
                rate=args.number("rate") or None,
            )
        )
    except Error as error:
        raise Failure(str(error), hint=hint_text(error)) from None
    finally:
        progress.end()
    if as_json:
        figures = {name.replace("_", "-"): value for name, value in done._asdict().items()}
        console.out(pretty({"filename": ref.text, "done": not only, **figures}))
    elif not args.flag("quiet"):
        would = "would be " if only else ""
        console.out(
            f"{printable(ref.text)}: {would}{done.file_size} -> {done.new_size} bytes; {done.moved} bytes {would}moved "
            f"({done.moved_data} data, {done.moved_tables} tables, {done.moved_blocks} refcount blocks, "
            f"{done.moved_other} others)\n"
            f"leaks {done.leaks}, zeros {done.zeros}, free below the end {done.free}, "
            f"last cluster that cannot move ends at {done.fixed_end}\n" + (f"{done.left}\n" if done.left else "")
        )
    return 0
