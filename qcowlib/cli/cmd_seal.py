# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``seal``: write the hashes of what a disk holds to a file beside it.

Invariant: the seal is replaced when all of it is known; the image is not changed.
"""

from __future__ import annotations

import shlex
import subprocess

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, open_image
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.cli.values import size_option
from qcowlib.errors import Error
from qcowlib.units import human_size

__all__ = ["COMMAND", "run", "run_tool"]

COMMAND = Command(
    "seal",
    "Write hashes of what a disk holds, for verify to find silent damage.",
    "FILE",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORCE_SHARE,
        options.FORMAT,
        Option("", "seal", "seal", "the file to write (default: FILE.seal)", meta="FILE"),
        Option("l", "", "snapshot", "seal this snapshot", meta="NAME"),
        Option("", "bitmap", "bitmap", "bring the seal up to date by what this bitmap has recorded", meta="BITMAP"),
        Option(
            "",
            "unit",
            "unit",
            "one hash for so many bytes, 4k to 2M (default: 64k)",
            meta="SIZE",
            convert=lambda text, console: size_option("unit", text, console),
        ),
        Option("", "sign", "sign", "then run COMMAND with the name of the seal behind it", meta="COMMAND"),
        Option("", "plan", "plan", "only say how much would be read"),
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        options.RATE,
        options.OUTPUT,
    ),
    "seal disk.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``seal``."""
    from qcowlib.jobs.seal import DEFAULT_UNIT, plan_seal, seal, seal_name

    ref = options.single_image(args)
    as_json = options.wants_json(args)
    target = args.text("seal") or seal_name(ref.plain_path)
    secrets = parse_secrets(args.texts("object"))
    with open_image(
        ref,
        console,
        secrets=secrets,
        force_share=args.flag("force-share"),
        snapshot=args.text("snapshot"),
    ) as image:
        if args.flag("plan"):
            try:
                stored = plan_seal(image, target, bitmap=args.text("bitmap"))
            except Error as error:
                raise Failure(str(error), hint=hint_text(error)) from None
            if as_json:
                console.out(pretty({"filename": ref.text, "seal": target, "read": stored}))
            else:
                console.out(f"{human_size(stored)} to read, the seal goes to {target}\n")
            return 0
        progress = Progress(
            console,
            args.flag("progress") and not args.flag("quiet"),
            total=image.size,
            form=options.progress_form(args),
        )
        progress.report(0)
        try:
            made = seal(
                image,
                target,
                unit=args.number("unit") or DEFAULT_UNIT,
                bitmap=args.text("bitmap"),
                progress=progress.within(),
                rate=args.number("rate") or None,
            )
            progress.report(100)
        except Error as error:
            raise Failure(str(error), hint=hint_text(error)) from None
        finally:
            progress.end()
    if args.text("sign") is not None:
        run_tool(args.text("sign") or "", target)
    if as_json:
        console.out(pretty({"filename": ref.text, "seal": target, "hashes": made.hashes, "digest": made.digest}))
    elif not args.flag("quiet"):
        console.out(f"{made.hashes} hashes in {target}\ndigest: {made.digest}\n")
    return 0


def run_tool(command: str, path: str) -> None:
    """Run the user's own *command*, without a shell, with *path* behind it.  Raises :class:`Failure`."""
    try:
        words = shlex.split(command)
        if not words:
            raise ValueError("it is empty")
        done = subprocess.run([*words, path], check=False)
    except (OSError, ValueError) as error:
        raise Failure(f"Could not run '{command}': {error}") from None
    if done.returncode:
        raise Failure(f"'{command}' ended with status {done.returncode}")
