# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``overlay``: many overlays over one base in one call.

Invariant: all of them are made, or none; with ``--plan`` none.
"""

from __future__ import annotations

import re
import sys

from qcowlib.cli import options, several
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.opening import references
from qcowlib.cli.optlist import OptionList, create_table
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.cli.values import size_option
from qcowlib.errors import Error

__all__ = ["COMMAND", "run"]

_MOST = 1_000_000


def _count(text: str, _console: Console) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= _MOST):
        raise Failure(f"--count takes a number from 1 to {_MOST}")
    return int(text[:9])


COMMAND = Command(
    "overlay",
    "Make many overlays over one image.",
    "NAME...",
    (
        options.HELP,
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        Option("b", "", "backing", "the image they stand on, as stored in each", meta="BACKING"),
        Option("F", "", "backing-format", "its format", meta="FMT"),
        Option(
            "s",
            "size",
            "size",
            "virtual size (default: that of the backing file)",
            meta="SIZE",
            convert=lambda text, console: size_option("image size", text, console),
        ),
        Option("", "count", "count", "NAME has a %d (or %04d) for 1 to COUNT", meta="COUNT", convert=_count),
        Option("", "names", "names", "take the names from FILE (-: standard input), one a line", meta="FILE"),
        Option("", "plan", "plan", "say which would be made; make none"),
        options.list_option(),
        several.JOBS,
        options.OUTPUT,
    ),
    "overlay -b base.qcow2 -F qcow2 --count 1000 'vm-%04d.qcow2'",
)


def run(args: Args, console: Console) -> int:
    """Run ``overlay``."""
    from qcowlib.cli.creation import job_options
    from qcowlib.jobs.many import create_overlays, plan_overlays

    backing, backing_format = args.text("backing"), args.text("backing-format")
    if backing is None or backing_format is None:
        raise usage_failure("Expecting -b BACKING and -F FMT")
    names = _names(args)
    values = OptionList(create_table("qcow2"))
    values.parse(args.texts("options"), console)
    as_json = options.wants_json(args)
    only = args.flag("plan")
    try:
        plan = plan_overlays(
            backing,
            names,
            backing_format=backing_format,
            size=args.number("size"),
            references=references(),
            **job_options(values),
        )
        if not only:
            shown = args.flag("progress") and not args.flag("quiet")
            progress = Progress(console, shown, form=options.progress_form(args))
            progress.report(0)
            try:
                create_overlays(
                    backing,
                    plan.paths,
                    backing_format=backing_format,
                    size=plan.size,
                    references=references(),
                    workers=args.number("jobs"),
                    progress=progress.report,
                    **job_options(values),
                )
                progress.report(100)
            finally:
                progress.end()
    except Error as error:
        raise Failure(str(error), hint=f"{error.hint}\n" if error.hint else "") from None
    if as_json:
        console.out(pretty({"backing-filename": backing, "overlays": plan.paths, "virtual-size": plan.size}))
    elif not args.flag("quiet"):
        would = " would be made" if only else ""
        console.out(f"{len(plan.paths)} overlays over {backing}{would}\n")
    return 0


def _names(args: Args) -> list[str]:
    count = args.number("count")
    names = list(args.operands)
    if count is not None:
        if len(names) != 1:
            raise usage_failure("--count takes one NAME")
        if not re.fullmatch(r"[^%]*%(0?[1-9])?d[^%]*", names[0]):
            raise Failure(f"'{names[0]}' has no single %d or %04d for the number")
        names = [names[0] % number for number in range(1, count + 1)]
    if args.text("names") is not None:
        names += _read_names(str(args.text("names")))
    if not names:
        raise usage_failure("Expecting at least one name")
    return names


def _read_names(path: str) -> list[str]:
    try:
        if path == "-":
            return sys.stdin.read().splitlines()
        with open(path, errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError as error:
        raise Failure(f"Could not read '{path}': {error.strerror}") from None
