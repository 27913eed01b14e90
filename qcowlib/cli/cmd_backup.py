# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``backup``: what changed since bitmaps began, as an overlay over the backup before.

Invariant: a bitmap is advanced only when the new file, and its name, are durable.
"""

from __future__ import annotations

from qcowlib.cli import creation, options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, open_image, references
from qcowlib.cli.optlist import OptionList, create_help, create_table, help_wanted
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.cli.jsonout import Json
    from qcowlib.image import Image

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "backup",
    "Copy what changed since a bitmap began to a new overlay over the backup before.",
    "FILE [NEW-FILE]",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORCE_SHARE,
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        options.FORMAT,
        options.CACHE,
        options.SOURCE_CACHE,
        Option("", "bitmap", "bitmap", "what this bitmap has recorded; several add up", meta="BITMAP", repeat=True),
        Option("", "list", "list", "print the changed ranges, and copy nothing"),
        Option("", "measure", "measure", "print how large the new file can become, and copy nothing"),
        Option("", "plan", "plan", "say what would be copied and how large NEW-FILE can become; make none"),
        Option("b", "", "backing", "the backup before, stored as given", meta="BACKING"),
        Option("F", "", "backing-format", "format of that backup", meta="FMT"),
        Option("", "advance", "advance", "then let the bitmap start anew, for the next backup"),
        Option("c", "", "compress", "compress the data"),
        options.list_option(),
        options.RATE,
        options.OUTPUT,
    ),
    "backup --bitmap nightly --advance -b full.qcow2 -F qcow2 disk.qcow2 monday.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``backup``."""
    as_json = options.wants_json(args)
    lists, bitmaps = args.texts("options"), args.texts("bitmap")
    if help_wanted(lists):
        console.out(create_help("qcow2", bool(args.operands)))
        return 0
    _check(args, bitmaps)
    secrets = parse_secrets(args.texts("object"))
    values = OptionList(create_table("qcow2"))
    values.parse(lists, console)
    ref = image_ref(args.operands[0], args.text("format"), image_opts=args.flag("image-opts"))
    with open_image(
        ref,
        console,
        secrets=secrets,
        writable=args.flag("advance") and not args.flag("plan"),
        force_share=args.flag("force-share"),
        cache=options.cache_mode(args, source=True),
    ) as image:
        try:
            if args.flag("list"):
                _list(image, bitmaps, console, as_json=as_json)
            elif args.flag("measure"):
                _measure(image, bitmaps, values, console, as_json=as_json)
            elif args.flag("plan"):
                _plan(image, args, bitmaps, values, console, as_json=as_json)
            else:
                _backup(image, args, bitmaps, values, console)
        except Error as error:
            raise Failure(str(error), hint=hint_text(error)) from None
    return 0


def _check(args: Args, bitmaps: list[str]) -> None:
    """Refuse lines that make no sense.  Raises :class:`Failure`."""
    looks = args.flag("list") + args.flag("measure")
    if not bitmaps:
        raise Failure("Need at least one --bitmap")
    if looks > 1:
        raise Failure("--list and --measure cannot be used together")
    if looks and args.flag("plan"):
        raise Failure("--plan is for copying, not for --list or --measure")
    if looks and (args.flag("advance") or args.flag("backing")):
        raise Failure("--advance and -b are for copying, not for --list or --measure")
    if len(args.operands) != (1 if looks else 2):
        raise Failure("Expecting one image file name" if looks else "Expecting an image and the name of a new file")
    if not looks and (args.text("backing") is None or args.text("backing-format") is None):
        raise Failure("The backup before is needed: -b BACKING -F FMT")


def _backup(image: Image, args: Args, bitmaps: list[str], values: OptionList, console: Console) -> None:
    from qcowlib.jobs.backup import backup

    for name in ("encryption", "encrypt.format", "size", "backing_file", "backing_fmt"):
        if name in values:
            raise Failure(f"A backup does not take the option '{name}'")
    target, backing = args.operands[1], args.text("backing") or ""
    quiet, as_json = args.flag("quiet"), options.wants_json(args)
    progress = Progress(
        console, args.flag("progress") and not quiet, total=image.size, form=options.progress_form(args)
    )
    progress.report(0)
    try:
        changed = backup(
            image,
            creation.protocol_path(target),
            bitmaps,
            backing=backing,
            backing_format=args.text("backing-format") or "",
            advance=args.flag("advance"),
            compress=args.flag("compress"),
            references=references(),
            cache=options.cache_mode(args),  # type: ignore[arg-type]
            progress=progress.within(),
            rate=args.number("rate") or None,
            **creation.job_options(values),
        )
        progress.report(100)
    finally:
        progress.end()
    if as_json:
        advanced = args.flag("advance")
        console.out(pretty({"filename": target, "backing-filename": backing, "changed": changed, "advanced": advanced}))
    elif not quiet:
        console.out(f"{changed} bytes changed, now in {target}.\n")


def _plan(image: Image, args: Args, bitmaps: list[str], values: OptionList, console: Console, *, as_json: bool) -> None:
    """Say what the same line without ``--plan`` would do."""
    from qcowlib.jobs.backup import changed_ranges, measure_backup
    from qcowlib.jobs.creation import file_options

    chosen = creation.job_options(values)
    cluster = file_options(chosen, image.size).cluster_size
    changed = sum(end - start for start, end in changed_ranges(image, bitmaps, cluster))
    most = measure_backup(image, bitmaps, **chosen).required
    target, backing, advance = args.operands[1], args.text("backing") or "", args.flag("advance")
    if as_json:
        found: dict[str, Json] = {"filename": target, "backing-filename": backing}
        console.out(pretty({**found, "changed": changed, "required": most, "advances": bitmaps if advance else []}))
        return
    console.out(f"{changed} bytes changed, would be in {target}, at most {most} bytes long, over {backing}.\n")
    if advance:
        console.out(f"Would begin anew: {', '.join(map(printable, bitmaps))}\n")


def _list(image: Image, bitmaps: list[str], console: Console, *, as_json: bool) -> None:
    from qcowlib.jobs.backup import changed_ranges

    ranges = changed_ranges(image, bitmaps)
    if not as_json:
        console.out(f"{'Offset':<16}{'Length'}\n")
        for start, end in ranges:
            console.out(f"{start and hex(start):<16}{end - start:#x}\n")
        return
    # In the form of ``map --output=json``, one range a line, however many there are.
    before = "["
    for start, end in ranges:
        console.out(f'{before}{{ "start": {start}, "length": {end - start}}}')
        before = ",\n"
    console.out("[]\n" if before == "[" else "]\n")


def _measure(image: Image, bitmaps: list[str], values: OptionList, console: Console, *, as_json: bool) -> None:
    from qcowlib.jobs.backup import measure_backup

    found = measure_backup(image, bitmaps, **creation.job_options(values))
    if as_json:
        console.out(pretty({"required": found.required, "fully-allocated": found.fully_allocated}))
    else:
        console.out(f"required size: {found.required}\nfully allocated size: {found.fully_allocated}\n")
