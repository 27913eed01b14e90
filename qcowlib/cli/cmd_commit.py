# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``commit``: write an overlay into its base.

Invariant: nothing is written before the whole chain is open.
"""

from __future__ import annotations

import os
from itertools import pairwise

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import ImageRef, has_protocol
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, layer_secrets, open_image, references, tell_probed_raw
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error, StorageError, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.image import Image

__all__ = ["COMMAND", "run"]

_REQUESTS = ("read", "write", "zero", "discard", "flush", "write-zeroes", "block-status")

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
        base = _base_path(ref, image, args.text("base"))
    progress = Progress(
        console, args.flag("progress") and not args.flag("quiet"), total=size, form=options.progress_form(args)
    )
    progress.report(0)
    try:
        _commit(ref, args, base, cache, layer_secrets(ref, secrets), progress)
        progress.report(100)
    finally:
        progress.end()
    if as_json:
        console.out(pretty({"filename": ref.text, "base": args.text("base"), "committed": True}))
    elif not args.flag("quiet"):
        console.out("Image committed.\n")
    return 0


def _base_path(ref: ImageRef, image: Image, wanted: str | None) -> str | None:
    """Return the path of the layer that ``-b`` names.  Raises :class:`Failure` if it is not in the chain.

    Source: as qemu, a relative name is seen from the folder of the image above, a protocol's is compared as text.
    """
    if wanted is None:
        return None
    from qcowlib.qcow2.image import Qcow2Image

    for above, below in pairwise(image.layers):
        stored = os.fsdecode((isinstance(above, Qcow2Image) and above.header.backing_file) or b"")
        if has_protocol(wanted) or has_protocol(stored):
            found = wanted in (stored, below.storage.name)
        else:
            named = os.path.join(os.path.dirname(above.storage.name), wanted)
            found = os.path.realpath(named) == os.path.realpath(below.storage.name)
        if found:
            return below.storage.name
    raise Failure(f"Did not find '{printable(wanted)}' in the backing chain of '{ref.text}'")


def _commit(
    ref: ImageRef, args: Args, base: str | None, cache: str, secret: list[bytes | None], progress: Progress
) -> None:
    from qcowlib.jobs.commit import commit

    try:
        commit(
            ref.plain_path,
            format=ref.format,
            base=base,
            empty=False if args.flag("keep") else None,
            references=references(ref),
            cache=cache,  # type: ignore[arg-type]
            secret=secret,
            progress=progress.within(),
            rate=args.number("rate") or None,
        )
    except StorageError as error:
        text = f"Block job failed: {error.strerror}" if error.operation in _REQUESTS else error.message
        raise Failure(text, hint=hint_text(error)) from None
    except Error as error:
        raise Failure(error.message, hint=hint_text(error)) from None
