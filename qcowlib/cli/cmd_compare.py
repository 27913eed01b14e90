# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``compare``: do two images have the same content.

Invariant: exit status 0 identical, 1 different, 2 cannot open, 3 no block
status, 4 cannot read.
"""

from __future__ import annotations

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import ImageRef, image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import open_image
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error, StorageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.cli.jsonout import Json
    from qcowlib.image import Image
    from qcowlib.jobs.compare import Comparison

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "compare",
    "Compare the content of two images; exit status 0 identical, 1 different.",
    "FILE1 FILE2",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORMAT,
        Option("F", "", "format2", "format of the second image", meta="FMT"),
        options.SOURCE_CACHE,
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        Option("s", "", "strict", "sizes and allocation must be the same too"),
        options.FORCE_SHARE,
        options.OUTPUT_EXTRA,
    ),
    "compare disk.raw disk.qcow2",
)

_CANNOT_OPEN = 2
_NO_STATUS = 3
_CANNOT_READ = 4
_SIZES_DIFFER = "Warning: Image size mismatch!\n"
_PROGRESS_STEP = 2.0


def run(args: Args, console: Console) -> int:
    """Run ``compare``."""
    if len(args.operands) != 2:
        raise usage_failure("Expecting two image file names")
    as_json = options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    image_opts, shared = args.flag("image-opts"), args.flag("force-share")
    try:
        cache = options.cache_mode(args, source=True)
        refs = [
            image_ref(name, args.text(fmt), image_opts=image_opts)
            for name, fmt in zip(args.operands, ("format", "format2"), strict=True)
        ]
    except Failure as failure:
        failure.code = _CANNOT_OPEN
        raise
    progress = Progress(
        console,
        args.flag("progress") and not args.flag("quiet"),
        step=_PROGRESS_STEP,
        form=options.progress_form(args),
    )
    first, second = refs
    with (
        open_image(first, console, secrets=secrets, force_share=shared, cache=cache, code=_CANNOT_OPEN) as one,
        open_image(second, console, secrets=secrets, force_share=shared, cache=cache, code=_CANNOT_OPEN) as two,
    ):
        progress.report(0)
        try:
            silent = as_json or args.flag("quiet")
            found = _compare(one, two, refs, args.flag("strict"), progress, None if silent else console)
            if as_json:
                console.out(pretty(_json(found)))
            elif not silent:
                console.out(_text(found))
        finally:
            progress.end()
    return 0 if found else 1


def _compare(
    one: Image, two: Image, refs: list[ImageRef], strict: bool, progress: Progress, console: Console | None
) -> Comparison:
    from qcowlib.jobs.compare import compare

    try:
        return compare(one, two, strict=strict, progress=progress.within())
    except StorageError as error:
        files = {one.path, *(layer.data.name for layer in one.layers)}
        name = refs[0].text if error.path in files else refs[1].text
        if error.operation == "block-status":
            raise Failure(f"Sector allocation test failed for {name}", code=_NO_STATUS) from None
        if console is not None and one.size != two.size and (error.offset or 0) >= min(one.size, two.size):
            console.out(_SIZES_DIFFER)
        raise Failure(
            f"Error while reading offset {error.offset or 0} of {name}: {error.strerror}", code=_CANNOT_READ
        ) from None
    except Error as error:
        raise Failure(str(error), code=_CANNOT_READ) from None


def _text(found: Comparison) -> str:
    warning = _SIZES_DIFFER if found.size_differs and found.verdict != "size" else ""
    if found.verdict == "size":
        return "Strict mode: Image size mismatch!\n"
    if found.verdict == "status":
        return f"Strict mode: Offset {found.offset} block status mismatch!\n"
    if found.verdict == "content":
        return f"{warning}Content mismatch at offset {found.offset}!\n"
    return f"{warning}Images are identical.\n"


def _json(found: Comparison) -> Json:
    result: dict[str, Json] = {"identical": bool(found), "verdict": found.verdict, "size-differs": found.size_differs}
    if found.offset is not None:
        result["offset"] = found.offset
    return result
