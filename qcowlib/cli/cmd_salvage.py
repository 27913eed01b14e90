# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``salvage``: copy what can still be read of a damaged image, and tell what was lost.

Invariant: the damaged image is never written to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcowlib.cli import creation, options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, references, secret_of
from qcowlib.cli.optlist import OptionList, create_table
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error, printable
from qcowlib.units import human_size

if TYPE_CHECKING:
    from qcowlib.jobs.salvage import Salvaged

__all__ = ["COMMAND", "LOST", "run"]

#: The exit status when something was lost.
LOST = 2

COMMAND = Command(
    "salvage",
    "Copy what can be read of a damaged image; exit status 0 all of it, 2 something was lost.",
    "FILE [NEW-FILE]",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORCE_SHARE,
        options.FORMAT,
        Option("O", "", "output-format", "format of NEW-FILE, qcow2 (default) or raw", meta="FMT"),
        options.list_option(),
        Option("", "plan", "plan", "read everything and say what would be lost; no NEW-FILE"),
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        options.RATE,
        options.OUTPUT,
    ),
    "salvage disk.qcow2 rescued.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``salvage``."""
    from qcowlib.jobs.salvage import salvage

    as_json = options.wants_json(args)
    if len(args.operands) != (1 if args.flag("plan") else 2):
        raise usage_failure("Expecting an image file name and that of a new file, or --plan and one name")
    fmt = args.text("output-format") or "qcow2"
    if fmt not in ("qcow2", "raw"):
        raise Failure(f"Unknown file format '{fmt}'")
    values = OptionList(create_table(fmt))
    values.parse(args.texts("options"), console)
    secrets = parse_secrets(args.texts("object"))
    ref = image_ref(args.operands[0], args.text("format"), image_opts=args.flag("image-opts"))
    target = None if args.flag("plan") else creation.protocol_path(args.operands[1])
    progress = Progress(console, args.flag("progress") and not args.flag("quiet"), form=options.progress_form(args))
    progress.report(0)
    try:
        found = salvage(
            ref.plain_path,
            target,
            format=fmt,  # type: ignore[arg-type]
            source_format=ref.format,
            references=references(),
            force_share=args.flag("force-share"),
            secret=secret_of(ref, secrets),
            progress=progress.within(),
            rate=args.number("rate") or None,
            **creation.job_options(values),
        )
        progress.report(100)
    except Error as error:
        raise Failure(str(error), hint=hint_text(error)) from None
    finally:
        progress.end()
    if as_json:
        lost = [{"start": o.start, "length": o.length, "kind": o.kind, "reason": o.reason} for o in found.lost]
        console.out(pretty({"virtual-size": found.size, "lost-bytes": found.lost_bytes, "lost": lost}))
    elif not args.flag("quiet"):
        console.out(_text(found))
    return LOST if found.lost else 0


def _text(found: Salvaged) -> str:
    lines = [f"{one.start:#x} {one.length:#x} {one.kind} ({printable(one.reason)})" for one in found.lost]
    if found.lost:
        lines.append(f"{human_size(found.lost_bytes)} of {human_size(found.size)} lost")
    else:
        lines.append("Everything was read.")
    return "\n".join(lines) + "\n"
