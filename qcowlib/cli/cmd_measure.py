# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``measure``: how large a new image would be.

Invariant: nothing is written.
"""

from __future__ import annotations

from contextlib import ExitStack

from qcowlib.cli import creation, options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.encryption import encrypted_bytes
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, open_image
from qcowlib.cli.optlist import OptionList, create_table
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.values import size_option
from qcowlib.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from qcowlib.image import Image
    from qcowlib.jobs.measure import Measurement

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "measure",
    "Tell how large a new image of a size, or with the content of an image, would be.",
    "[FILE]",
    (
        options.HELP,
        options.IMAGE_OPTS,
        options.OBJECT,
        options.OUTPUT,
        Option(
            "",
            "size",
            "size",
            "virtual size of an empty image",
            meta="SIZE",
            convert=lambda text, console: size_option("image size", text, console),
        ),
        options.FORCE_SHARE,
        options.FORMAT,
        Option("O", "", "target-format", "format of the new image (default: raw)", meta="FMT"),
        options.list_option(),
        Option("l", "", "snapshot", "the content of this snapshot", meta="SNAPSHOT", convert=options.snapshot_name),
    ),
    "measure -O qcow2 disk.raw",
    getopt_style=True,
)


def run(args: Args, console: Console) -> int:
    """Run ``measure``."""
    as_json = options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    size, name = args.number("size"), args.operands[0] if args.operands else None
    if len(args.operands) > 1:
        raise Failure("At most one filename argument is allowed.")
    if name is None and (args.flag("image-opts") or args.flag("format") or args.flag("snapshot")):
        raise Failure("--image-opts, -f, and -l require a filename argument.")
    if name is None and size is None:
        raise Failure("Either --size N or one filename must be specified.")
    if name is not None and size is not None:
        raise Failure("--size N cannot be used together with a filename.")
    fmt = args.text("target-format") or "raw"
    with ExitStack() as stack:
        source: int | Image = size or 0
        if name is not None:
            source = _open(args, name, secrets, console)
            stack.callback(source.close)
        found = _measure(args, fmt, source, secrets, console)
    if as_json:
        result = {"required": found.required, "fully-allocated": found.fully_allocated}
        if found.bitmaps is not None:
            result["bitmaps"] = found.bitmaps
        console.out(pretty(result))
        return 0
    console.out(f"required size: {found.required}\nfully allocated size: {found.fully_allocated}\n")
    if found.bitmaps is not None:
        console.out(f"bitmaps size: {found.bitmaps}\n")
    return 0


def _open(args: Args, name: str, secrets: Mapping[str, bytes], console: Console) -> Image:
    ref = image_ref(name, args.text("format"), image_opts=args.flag("image-opts"))
    snapshot = args.text("snapshot")
    try:
        return open_image(ref, console, secrets=secrets, force_share=args.flag("force-share"), snapshot=snapshot)
    except Failure as failure:
        options.reraise_snapshot(failure, snapshot)
        raise


def _measure(args: Args, fmt: str, source: int | Image, secrets: Mapping[str, bytes], console: Console) -> Measurement:
    if not creation.can_create(fmt):
        raise creation.not_made(fmt)
    if fmt == "file":
        raise Failure("Block driver 'file' does not support size measurement")
    values = OptionList(create_table(fmt))
    try:
        values.parse(args.texts("options"), console)
    except Failure as failure:
        console.fail(failure)
        raise Failure(f"Invalid options for file format '{fmt}'") from None
    _check_choices(values)
    header = encrypted_bytes(fmt, values, secrets)
    from qcowlib.jobs.measure import Measurement, measure

    try:
        found = measure(
            source,
            format="qcow2" if fmt == "qcow2" else "raw",
            backing=values.text("backing_file") if not isinstance(source, int) else None,
            luks_header_size=header if fmt == "qcow2" else 0,
            **(creation.job_options(values) if fmt == "qcow2" else {}),
        )
    except Error as error:
        text = error.message.replace("(use version=v3 or greater)", "(use compat=1.1 or greater)")
        raise Failure(text, hint=hint_text(error)) from None
    if fmt == "luks":
        return Measurement(found.required + header, found.fully_allocated + header)
    return found


def _check_choices(values: OptionList) -> None:
    """Refuse wrong choices with the words that measure has for them, and forget what does not matter here."""
    compat, mode = values.text("compat"), values.text("preallocation")
    if compat is not None and compat not in ("0.10", "1.1", "v2", "v3"):
        raise Failure(f"Invalid compatibility level: '{compat}'")
    if mode is not None and mode not in ("off", "metadata", "falloc", "full"):
        raise Failure(f"invalid parameter value: {mode}")
    if values.text("backing_file") is not None:
        values.remove("preallocation")  # with a backing file all clusters count anyway
    values.remove("compression_type")
    values.remove("data_file")
    values.remove("data_file_raw")
