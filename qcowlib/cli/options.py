# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Options that several subcommands share, and what their values mean.

Invariant: an option means the same in every command that has it.
"""

from __future__ import annotations

from qcowlib.cli.console import Failure, usage_failure
from qcowlib.cli.names import ImageRef, image_ref
from qcowlib.cli.parser import Args, Option
from qcowlib.cli.values import check_list, size_option, split_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.cli.console import Console

HELP = Option("h", "help", "help", "show this help")
OBJECT = Option("", "object", "object", "secret,id=ID,data=TEXT or file=PATH: a passphrase", meta="OBJECT", repeat=True)
IMAGE_OPTS = Option("", "image-opts", "image-opts", "file names are option lists: driver=qcow2,file.filename=PATH")
FORCE_SHARE = Option("U", "force-share", "force-share", "open even if the image is in use")
FORMAT = Option("f", "", "format", "format of the image (default: probed)", meta="FMT")
FORMAT_LONG = Option("f", "format", "format", "format of the image (default: probed)", meta="FMT")
OUTPUT = Option("", "output", "output", "human (default) or json", meta="FORM")
OUTPUT_EXTRA = Option("", "output", "output", "human (default) or json", meta="FORM", extra=True)
QUIET = Option("q", "", "quiet", "print errors only")
PROGRESS = Option("p", "", "progress", "show progress")
PROGRESS_FORM = Option(
    "", "progress", "progress-form", "json: as JSON lines on standard error", meta="FORM", extra=True
)
CACHE = Option("t", "", "cache", "cache mode of what is written", meta="CACHE")
SOURCE_CACHE = Option("T", "", "source-cache", "cache mode of what is read", meta="CACHE")
RATE = Option(
    "r",
    "",
    "rate",
    "at most this many bytes a second",
    meta="RATE",
    convert=lambda text, console: size_option("rate limit", text, console),
)

CACHE_MODES = ("none", "off", "writeback", "writethrough", "directsync", "unsafe")

__all__ = [
    "CACHE",
    "CACHE_MODES",
    "FORCE_SHARE",
    "FORMAT",
    "FORMAT_LONG",
    "HELP",
    "IMAGE_OPTS",
    "OBJECT",
    "OUTPUT",
    "OUTPUT_EXTRA",
    "PROGRESS",
    "PROGRESS_FORM",
    "QUIET",
    "RATE",
    "SOURCE_CACHE",
    "cache_mode",
    "list_option",
    "progress_form",
    "reraise_snapshot",
    "single_image",
    "snapshot_name",
    "wants_json",
]


def list_option(name: str = "options", text: str = "options of the format, -o help lists them") -> Option:
    """Return ``-o``, whose occurrences add up."""

    def convert(value: str, _console: Console) -> str:
        check_list(value)
        return value

    return Option("o", "", name, text, meta="KEY=VALUE,...", convert=convert, repeat=True)


def wants_json(args: Args) -> bool:
    """Return whether ``--output=json`` was given.  Raises :class:`Failure`."""
    value = args.text("output")
    if value not in (None, "human", "json"):
        raise Failure("--output must be used with human or json as argument.")
    return value == "json"


def progress_form(args: Args) -> str | None:
    """Return ``json`` or None.  Raises :class:`Failure`."""
    value = args.text("progress-form")
    if value not in (None, "json", "human"):
        raise Failure("--progress must be used with human or json as argument.")
    return "json" if value == "json" else None


def cache_mode(args: Args, *, source: bool = False, default: str = "writeback") -> str:
    """Return the cache mode.  Raises :class:`Failure`."""
    mode = args.text("source-cache" if source else "cache") or default
    if mode not in CACHE_MODES:
        raise Failure(f"Invalid {'source ' if source else ''}cache option: {mode}")
    return "none" if mode == "off" else mode


def single_image(args: Args) -> ImageRef:
    """Return the only operand as an image.  Raises :class:`Failure`."""
    if len(args.operands) != 1:
        raise usage_failure("Expecting one image file name")
    return image_ref(args.operands[0], args.text("format"), image_opts=args.flag("image-opts"))


def snapshot_name(text: str, _console: Console) -> str:
    """Return the id or name that ``snapshot.id=X,snapshot.name=Y`` or a bare text means.  Raises :class:`Failure`."""
    if not text.startswith("snapshot."):
        return text
    wanted = ""
    for name, value in split_options(text):
        if name not in ("snapshot.id", "snapshot.name"):
            raise Failure(f"Invalid parameter '{name}'", f"Failed in parsing snapshot param '{text}'")
        wanted = value or wanted
    return wanted


def reraise_snapshot(failure: Failure, snapshot: str | None) -> None:
    """Raise what is to be said instead of *failure* if it is the snapshot that could not be opened."""
    if snapshot is None:
        return
    text = failure.messages[0]
    for cause in ("Can't find snapshot", "Snapshot L1 table too large", "Snapshot L1 table offset invalid"):
        if cause in text:
            raise Failure(f"Failed to load snapshot: {cause}") from None
    if "raw images have no snapshots" in text:
        cause = "Block format 'raw' used by device '' does not support temporarily loading internal snapshots"
        raise Failure(f"Failed to load snapshot: {cause}") from None
