# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``commit``: write an overlay into its base.

Invariant: nothing is written before the whole chain is open.
"""

from __future__ import annotations

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import ImageRef
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, layer_secrets, open_image, references, tell_probed_raw
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "commit",
    "Write what an overlay holds into its backing file.",
    "FILE",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.QUIET,
        options.FORMAT,
        options.CACHE,
        Option("b", "", "base", "write into this image of the chain (implies -d)", meta="BASE"),
        Option("d", "", "keep", "do not empty the overlay"),
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.RATE,
        options.OUTPUT_EXTRA,
    ),
    "commit overlay.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``commit``."""
    ref = options.single_image(args)
    as_json = options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    cache = options.cache_mode(args)
    with open_image(ref, console, secrets=secrets) as image:
        tell_probed_raw(ref, image, console)
        size = image.size
    progress = Progress(
        console, args.flag("progress") and not args.flag("quiet"), total=size, form=options.progress_form(args)
    )
    progress.report(0)
    try:
        _commit(ref, args, cache, layer_secrets(ref, secrets), progress)
        progress.report(100)
    finally:
        progress.end()
    if as_json:
        console.out(pretty({"filename": ref.text, "base": args.text("base"), "committed": True}))
    elif not args.flag("quiet"):
        console.out("Image committed.\n")
    return 0


def _commit(ref: ImageRef, args: Args, cache: str, secret: list[bytes | None], progress: Progress) -> None:
    from qcowlib.jobs.commit import commit

    try:
        commit(
            ref.path,
            format=ref.format,
            base=args.text("base"),
            empty=False if args.flag("keep") else None,
            references=references(ref),
            cache=cache,  # type: ignore[arg-type]
            secret=secret,
            progress=progress.within(),
            rate=args.number("rate") or None,
        )
    except Error as error:
        raise Failure(error.message, hint=hint_text(error)) from None
