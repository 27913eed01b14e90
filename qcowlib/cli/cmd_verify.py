# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``verify``: tell where disks are not as they were sealed, and mend them from a copy.

Invariant: nothing is written unless ``--from`` names what to mend from, without
``--plan``, and then only what the seal says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcowlib.cli import options, several
from qcowlib.cli.cmd_seal import run_tool
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, open_image
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error, printable
from qcowlib.units import human_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from qcowlib.cli.jsonout import Json
    from qcowlib.jobs.seal import Verified

__all__ = ["COMMAND", "DAMAGED", "run"]

#: The exit status when a disk is not as it was sealed.
DAMAGED = 2

COMMAND = Command(
    "verify",
    "Tell where disks are not as they were sealed; exit status 0 as sealed, 2 not.",
    "FILE|DIR...",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORCE_SHARE,
        options.FORMAT,
        Option("", "seal", "seal", "the seal of the one FILE (default: FILE.seal)", meta="FILE"),
        Option("l", "", "snapshot", "verify this snapshot", meta="NAME"),
        Option("", "from", "from", "mend what is not as sealed from this copy", meta="FILE"),
        Option("", "plan", "plan", "mend nothing, say what would be mended; without --from, how much would be read"),
        Option("", "check", "check", "before, run COMMAND with the name of the seal behind it", meta="COMMAND"),
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        options.RATE,
        options.OUTPUT,
        several.JOBS,
        several.RECURSIVE,
    ),
    "verify disk.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``verify``."""
    as_json = options.wants_json(args)
    if not args.operands:
        raise usage_failure("Expecting at least one image file name or folder")
    many = several.is_many(args, console) or len(args.operands) > 1
    if many and (args.flag("seal") or args.flag("from") or args.flag("plan")):
        raise usage_failure("--seal, --from and --plan are for one FILE")
    if many:
        return several.run_many(args, console, lambda name: _answer(name, args, console), as_json=as_json)
    name = args.operands[0]
    if args.flag("plan") and not args.flag("from"):
        _plan(name, args, console, as_json=as_json)
        return 0
    progress = Progress(console, args.flag("progress") and not args.flag("quiet"), form=options.progress_form(args))
    progress.report(0)
    try:
        found = _verify(name, args, console, progress.within())
        progress.report(100)
    finally:
        progress.end()
    if as_json:
        console.out(pretty({"filename": name, **_json(found)}))
    elif not args.flag("quiet"):
        console.out(_text(found, plan=args.flag("plan")))
    return 0 if found else DAMAGED


def _plan(name: str, args: Args, console: Console, *, as_json: bool) -> None:
    """Say what would be read: all that the disk or the seal holds."""
    from qcowlib.jobs.seal import plan_verify, seal_name

    ref = image_ref(name, args.text("format"), image_opts=args.flag("image-opts"))
    sealed = args.text("seal") or seal_name(ref.plain_path)
    secrets = parse_secrets(args.texts("object"))
    share, snapshot = args.flag("force-share"), args.text("snapshot")
    with open_image(ref, console, secrets=secrets, force_share=share, snapshot=snapshot) as image:
        try:
            read = plan_verify(image, sealed)
        except Error as error:
            raise Failure(str(error), hint=hint_text(error)) from None
    if as_json:
        console.out(pretty({"filename": name, "seal": sealed, "read": read}))
    else:
        console.out(f"{human_size(read)} to read, to be compared with {sealed}\n")


def _verify(name: str, args: Args, console: Console, progress: Callable[[int, int], object] | None = None) -> Verified:
    from qcowlib.jobs.seal import heal, seal_name, verify

    secrets = parse_secrets(args.texts("object"))
    ref = image_ref(name, args.text("format"), image_opts=args.flag("image-opts"))
    sealed = args.text("seal") or seal_name(ref.plain_path)
    if args.text("check") is not None:
        run_tool(args.text("check") or "", sealed)
    other = args.text("from")
    with open_image(
        ref,
        console,
        secrets=secrets,
        writable=other is not None and not args.flag("plan"),
        force_share=args.flag("force-share"),
        snapshot=args.text("snapshot"),
    ) as image:
        try:
            rate = args.number("rate") or None
            if other is None:
                return verify(image, sealed, progress=progress, rate=rate)
            copy = image_ref(other, None, image_opts=args.flag("image-opts"))
            with open_image(copy, console, secrets=secrets) as source:
                return heal(image, source, sealed, progress=progress, rate=rate, plan=args.flag("plan"))
        except Error as error:
            raise Failure(str(error), hint=hint_text(error)) from None


def _answer(name: str, args: Args, console: Console) -> several.Answer:
    found = _verify(name, args, console)
    if found:
        return several.Answer("as sealed", "as sealed", _json(found))
    text = _text(found).rstrip("\n").replace("\n", "; ")
    return several.Answer("damaged", text, _json(found), DAMAGED)


def _json(found: Verified) -> dict[str, Json]:
    return {
        "verified": bool(found),
        "virtual-size": found.size,
        "sealed-size": found.sealed_size,
        "mended": found.healed,
        "damages": [
            {"start": one.start, "length": one.length, "kind": one.kind, "reason": one.reason} for one in found.damages
        ],
    }


def _text(found: Verified, *, plan: bool = False) -> str:
    lines = []
    if found.healed:
        lines.append(f"{human_size(found.healed)} {'would be ' if plan else ''}mended")
    if found.size != found.sealed_size:
        lines.append(f"the disk has {found.size} bytes, {found.sealed_size} were sealed")
    for one in found.damages:
        reason = f" ({printable(one.reason)})" if one.reason else ""
        lines.append(f"{one.start:#x} {one.length:#x} {one.kind}{reason}")
    if found:
        lines.append("The disk would be as it was sealed." if plan else "The disk is as it was sealed.")
    return "\n".join(lines) + "\n"
