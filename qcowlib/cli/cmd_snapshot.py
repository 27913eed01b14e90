# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``snapshot``: list, create, apply and delete internal snapshots.

Invariant: one action a call; without one nothing happens.
"""

from __future__ import annotations

import errno
import os

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.describe import describe, snapshot_table
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import ImageRef
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, luks_secret, open_failure, open_image, open_storage, tell_lost_bitmaps
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.errors import CorruptImage, Error, StorageError, UnsupportedFeature, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "snapshot",
    "List or change the internal snapshots of an image.",
    "FILE",
    (
        options.HELP,
        Option("l", "", "list", "list the snapshots"),
        Option("a", "", "apply", "go back to this snapshot (id or name)", meta="SNAPSHOT"),
        Option("c", "", "create", "make a snapshot of this name", meta="NAME"),
        Option("d", "", "delete", "delete the snapshot of this name", meta="NAME"),
        options.QUIET,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORCE_SHARE,
        options.OUTPUT_EXTRA,
    ),
    "snapshot -c before-upgrade disk.qcow2",
)

_ACTIONS = ("list", "apply", "create", "delete")
_FAILED = {
    "create": "Could not create snapshot",
    "apply": "Could not apply snapshot",
    "delete": "Could not delete snapshot",
}

_RAW = {
    "create": "-95 (Operation not supported)",
    "apply": "Block driver does not support snapshots",
    "delete": "snapshot not found",
}


def run(args: Args, console: Console) -> int:
    """Run ``snapshot``."""
    actions = [(name, text) for name, text in args.actions if name in _ACTIONS]
    if len(actions) > 1:
        raise usage_failure("Cannot mix '-l', '-a', '-c', '-d'")
    ref = options.single_image(args)
    options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    if not actions or actions[0][0] == "list":
        _list(ref, args, secrets, console, shown=bool(actions))
    else:
        _change(ref, args, actions[0], secrets, console)
    return 0


def _list(ref: ImageRef, args: Args, secrets: Mapping[str, bytes], console: Console, *, shown: bool) -> None:
    file, storage, header = open_storage(ref, force_share=args.flag("force-share"))
    try:
        tell_lost_bitmaps(header, console)
        if ref.format == "luks":
            luks_secret(ref, secrets)
        found = describe(ref, file, storage, header).get("snapshots", [])
    except Error as error:
        raise open_failure(ref.text, error) from None
    finally:
        file.close()
    if not isinstance(found, list) or not shown:
        return
    if options.wants_json(args):
        console.out(pretty(found))
    elif found:
        console.out("Snapshot list:\n" + snapshot_table(found))


def _change(ref: ImageRef, args: Args, action: tuple[str, str], secrets: Mapping[str, bytes], console: Console) -> None:
    verb, name = action
    compatible = console.prog.startswith("qemu-img")
    if args.flag("force-share"):
        raise Failure(f"Could not open '{ref.text}': force-share=on can only be used with read-only images")
    with open_image(ref, console, secrets=secrets, writable=True) as image:
        if image.format == "raw":
            raise Failure(f"{_FAILED[verb]} '{name}': {_RAW[verb]}")
        if compatible and verb == "apply" and image.bitmaps():
            # Source: qemu-img; here bitmaps go on, with everything recorded as changed.
            raise Failure(f"{_FAILED[verb]} '{name}': Device has active dirty bitmaps")
        try:
            if verb == "create":
                image.create_snapshot(name, as_qemu=compatible)
            elif verb == "apply":
                image.apply_snapshot(name)
            else:
                image.delete_snapshot(name, by_id=False)
        except Error as error:
            text = f"{_FAILED[verb]} '{name}': {_cause(verb, error, compatible)}"
            # Source: qemu-img tells of a damaged table in a line of its own.
            first = [error.message] if compatible and verb == "apply" and isinstance(error, CorruptImage) else []
            raise Failure(*first, text, hint=hint_text(error)) from None


def _cause(verb: str, error: Error, compatible: bool) -> str:
    """Return why *verb* failed; qemu-img has a number where we have a sentence."""
    if verb == "apply":
        return f"Failed to load snapshot: {_load_error(error, compatible)}"
    if verb == "delete":
        return "snapshot not found" if compatible and isinstance(error, UnsupportedFeature) else error.message
    known = errno.EFBIG if isinstance(error, UsageError) else getattr(error, "errno", None)
    code = known or (errno.EOPNOTSUPP if isinstance(error, UnsupportedFeature) else errno.EINVAL)
    detail = "" if isinstance(error, StorageError) or compatible else f": {error.message}"
    return f"-{code} ({os.strerror(code)}){detail}"


def _load_error(error: Error, compatible: bool) -> str:
    if isinstance(error, StorageError):
        return str(error.strerror)
    if error.message.startswith("Can't find snapshot"):
        return os.strerror(errno.ENOENT)
    if not compatible:
        return error.message
    if isinstance(error, UnsupportedFeature):
        return os.strerror(errno.EOPNOTSUPP)
    return os.strerror(errno.EFBIG if "too large" in error.message else errno.EINVAL)
