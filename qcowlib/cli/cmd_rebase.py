# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``rebase``: give an image another backing file.

Invariant: without ``-u`` the content of the image stays the same.
"""

from __future__ import annotations

from qcowlib.cli import creation, options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, layer_secrets, open_image, references
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.cli.names import ImageRef

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
    source_cache = options.cache_mode(args, source=True)
    ref = options.single_image(args)
    with open_image(ref, console, secrets=secrets, writable=True, cache=cache, backing=not unsafe) as image:
        size = image.size
    if fmt is not None and fmt not in creation.KNOWN_FORMATS:
        raise Failure(f"Invalid format name: '{fmt}'")
    shown = args.flag("progress") and not args.flag("quiet")
    progress = Progress(console, shown, step=2.0, total=size, form=options.progress_form(args))
    progress.report(0)
    try:
        _rebase(ref, args, console, cache, source_cache, layer_secrets(ref, secrets), progress)
        progress.report(100)
    finally:
        progress.end()
    return 0


def _rebase(
    ref: ImageRef,
    args: Args,
    console: Console,
    cache: str,
    source_cache: str,
    secret: list[bytes | None],
    progress: Progress,
) -> None:
    from qcowlib.jobs.rebase import rebase

    try:
        rebase(
            ref.plain_path,
            args.text("backing") or None,
            args.text("backing-format"),
            format=ref.format,
            unsafe=args.flag("unsafe"),
            sparse=not console.prog.startswith("qemu-img"),
            references=references(ref),
            cache=cache,  # type: ignore[arg-type]
            source_cache=source_cache,  # type: ignore[arg-type]
            secret=secret,
            progress=progress.within(),
        )
    except Error as error:
        raise Failure(error.message, hint=hint_text(error)) from None
