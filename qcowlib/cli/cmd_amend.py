# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``amend``: change format options of an image.

Invariant: all options are understood before the image is opened for writing.
"""

from __future__ import annotations

import errno
import os

from qcowlib.cli import creation, options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import image_ref
from qcowlib.cli.objects import parse_secrets, passphrase
from qcowlib.cli.opening import hint_text, open_image, secret_of
from qcowlib.cli.optlist import OptionList, amend_help, amend_table, create_table, help_wanted
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from qcowlib.qcow2.amend import AmendOptions

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "amend",
    "Change format options of an image.",
    "FILE",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        options.FORMAT,
        options.CACHE,
        Option("", "force", "force", "allow unsafe changes of key slots"),
        options.list_option(),
        options.OUTPUT_EXTRA,
    ),
    "amend -o compat=1.1,lazy_refcounts=on disk.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``amend``."""
    lists = args.texts("options")
    if not lists:
        raise usage_failure("Must specify options (-o)")
    options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    fmt = args.text("format")
    if fmt is not None and help_wanted(lists):
        return _help(fmt, console)
    if len(args.operands) != 1:
        raise Failure("Expecting one image file name")
    cache = options.cache_mode(args)
    ref = image_ref(args.operands[0], fmt, image_opts=args.flag("image-opts"))
    with open_image(ref, console, secrets=secrets, writable=True, cache=cache) as image:
        if help_wanted(lists):
            return _help(ref.format or image.format, console)
        kind = "luks" if ref.format == "luks" else image.format
        if kind not in ("qcow2", "luks"):
            raise _unsupported(kind)
        changes = _changes(_values(kind, lists, console), kind, secrets, secret_of(ref, secrets), args.flag("force"))
        shown = args.flag("progress") and not args.flag("quiet")
        progress = Progress(console, shown, form=options.progress_form(args))
        progress.report(0)
        try:
            image.amend(changes, progress.report, like_qemu=console.prog.startswith("qemu-img"))
            progress.report(100)
        except Error as error:
            raise _failure(error) from None
        finally:
            progress.end()
    if options.wants_json(args):
        console.out(pretty({"filename": ref.text, "amended": True}))
    return 0


def _failure(error: Error) -> Failure:
    if error.message.startswith("Snapshot L1 table "):
        # Source: qemu-img tells of a damaged table in a line of its own.
        cause = os.strerror(errno.EFBIG if "too large" in error.message else errno.EINVAL)
        return Failure(error.message, f"Failed to turn zero into data clusters: {cause}")
    return Failure(error.message, hint=hint_text(error))


def _changes(
    values: OptionList, fmt: str, secrets: Mapping[str, bytes], secret: bytes | None, force: bool
) -> AmendOptions:
    """Return what is wanted, as the library has it.  Raises :class:`Failure`."""
    from qcowlib.luks import KeyChange
    from qcowlib.qcow2.amend import AmendOptions

    def number(name: str) -> int | None:
        return values.number(name, 0) if name in values else None

    def flag(name: str) -> bool | None:
        return values.flag(name) if name in values else None

    def phrase(name: str) -> bytes | None:
        key = values.text(name)
        return None if key is None else passphrase(key, secrets)

    keys = None
    prefix = "" if fmt == "luks" else "encrypt."
    names = ("state", "keyslot", "old-secret", "new-secret", "iter-time")
    if fmt == "luks" or any(prefix + name in values for name in names):
        keys = KeyChange(
            values.text(f"{prefix}state"),
            number(f"{prefix}keyslot"),
            phrase(f"{prefix}old-secret"),
            phrase(f"{prefix}new-secret"),
            number(f"{prefix}iter-time"),
            secret,
            force,
        )
    return AmendOptions(
        values.text("compat"),
        number("size"),
        values.text("backing_file"),
        values.text("backing_fmt"),
        flag("lazy_refcounts"),
        number("refcount_bits"),
        values.text("data_file"),
        flag("data_file_raw"),
        keys,
    )


def _unsupported(fmt: str) -> Failure:
    return Failure(f"Format driver '{fmt}' does not support option amendment")


def _help(fmt: str, console: Console) -> int:
    if fmt not in ("qcow2", "luks"):
        raise _unsupported(fmt) if fmt in creation.KNOWN_FORMATS else Failure(f"Unknown file format '{fmt}'")
    console.out(amend_help(fmt))
    return 0


def _values(fmt: str, lists: list[str], console: Console) -> OptionList:
    values = OptionList(amend_table(fmt))
    try:
        values.parse(lists, console)
    except Failure as failure:
        text = failure.messages[0]
        known = {f"Invalid parameter '{option.name}'" for option in create_table(fmt)}
        if text in known:
            raise Failure(text, hint="This option is only supported for image creation\n") from None
        raise
    return values
