# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``backup-set``: backup or restore of several disks as one step.

Invariant: all bitmaps advance, or none; what was cut off is finished or taken
back by ``--finish`` with the same journal.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.opening import hint_text, references
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error, printable
from qcowlib.units import human_size

if TYPE_CHECKING:
    from qcowlib.jobs.backup import RestorePlan
    from qcowlib.jobs.backup_set import DiskBackup, DiskRestore

__all__ = ["COMMAND", "run"]

_MOST = 16 << 20
_BACKUP = {"source", "target", "bitmap", "backing", "backing-format", "source-format"}
_RESTORE = {"increment", "target", "format", "target-format"}

COMMAND = Command(
    "backup-set",
    "Back up what changed on several disks, and advance all their bitmaps or none.",
    "JOURNAL [SET]",
    (
        options.HELP,
        Option("", "restore", "restore", "SET names increments, to be applied to their targets"),
        Option("", "finish", "finish", "finish what JOURNAL is of, or take it back"),
        Option("", "plan", "plan", "only say what SET means and how much there is to copy"),
        Option("c", "", "compress", "compress the data"),
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.QUIET,
        options.RATE,
        options.OUTPUT,
    ),
    "backup-set --finish round.journal",
)


def run(args: Args, console: Console) -> int:
    """Run ``backup-set``."""
    as_json = options.wants_json(args)
    if len(args.operands) != (1 if args.flag("finish") else 2):
        raise usage_failure("Expecting the name of a journal and that of a set, or --finish and a journal")
    try:
        if args.flag("finish"):
            _finish(args, console, as_json=as_json)
        elif args.flag("restore"):
            _restore(args, console, as_json=as_json)
        else:
            _backup(args, console, as_json=as_json)
    except Error as error:
        raise Failure(str(error), hint=hint_text(error)) from None
    return 0


def _entries(name: str, keys: set[str]) -> list[dict[str, str]]:
    """Return the disks of the set in file *name*: a JSON list of objects.  Raises :class:`Failure`."""
    try:
        with open(name, "rb") as file:
            raw = file.read(_MOST + 1)
    except OSError as error:
        raise Failure(f"Could not read '{name}': {error.strerror}") from None
    except ValueError as error:
        raise Failure(f"Could not read '{printable(name)}': {error}") from None
    try:
        content = json.loads(raw[:_MOST].decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        raise Failure(f"'{name}' is no JSON") from None
    if not isinstance(content, list):
        raise Failure(f"'{name}' is no list of disks")
    for number, entry in enumerate(content, 1):
        if not isinstance(entry, dict) or not entry.keys() <= keys:
            raise Failure(f"disk {number} of '{name}' may have {', '.join(sorted(keys))} and nothing else")
        if not all(isinstance(value, str) for value in entry.values()):
            raise Failure(f"disk {number} of '{name}' has a value that is no text")
    return content


def _fields(entry: dict[str, str], number: int, needed: tuple[str, ...]) -> dict[str, str]:
    for key in needed:
        if key not in entry:
            raise Failure(f"disk {number} of the set lacks '{key}'")
    return {key.replace("-", "_"): value for key, value in entry.items()}


def _disks(name: str) -> list[DiskBackup]:
    from qcowlib.jobs.backup_set import DiskBackup

    needed = ("source", "target", "bitmap", "backing", "backing-format")
    return [DiskBackup(**_fields(entry, n, needed)) for n, entry in enumerate(_entries(name, _BACKUP), 1)]


def _pairs(name: str) -> list[DiskRestore]:
    from qcowlib.jobs.backup_set import DiskRestore

    return [DiskRestore(**_fields(e, n, ("increment", "target"))) for n, e in enumerate(_entries(name, _RESTORE), 1)]


def _progress(args: Args, console: Console) -> Progress:
    return Progress(console, args.flag("progress") and not args.flag("quiet"), form=options.progress_form(args))


def _backup(args: Args, console: Console, *, as_json: bool) -> None:
    from qcowlib.jobs.backup import measure_backup
    from qcowlib.jobs.backup_set import backup_set

    disks = _disks(args.operands[1])
    if args.flag("plan"):
        found = [(d.target, measure_backup(d.source, d.bitmap, source_format=d.source_format)) for d in disks]
        if as_json:
            console.out(pretty([{"target": name, "required": size.required} for name, size in found]))
        else:
            console.out("".join(f"{name}: {human_size(size.required)} at most\n" for name, size in found))
        return
    progress = _progress(args, console)
    progress.report(0)
    try:
        stored = backup_set(
            disks,
            args.operands[0],
            compress=args.flag("compress"),
            references=references(),
            progress=progress.within(),
            rate=args.number("rate") or None,
        )
        progress.report(100)
    finally:
        progress.end()
    if as_json:
        pairs = zip(disks, stored, strict=True)
        console.out(pretty([{"source": d.source, "target": d.target, "changed": count} for d, count in pairs]))
    elif not args.flag("quiet"):
        console.out(f"{len(disks)} disks, {human_size(sum(stored))} changed, all bitmaps advanced.\n")


def _restore(args: Args, console: Console, *, as_json: bool) -> None:
    from qcowlib.jobs.backup_set import restore_set

    pairs = _pairs(args.operands[1])
    if args.flag("plan"):
        planned = [(pair, _planned(pair)) for pair in pairs]
        if as_json:
            console.out(
                pretty(
                    [
                        {"increment": pair.increment, "target": pair.target, "data": found.data, "zeros": found.zeros}
                        for pair, found in planned
                    ]
                )
            )
        else:
            console.out(
                "".join(f"{pair.increment} to {pair.target}: {human_size(found.data)}\n" for pair, found in planned)
            )
        return
    progress = _progress(args, console)
    progress.report(0)
    try:
        restore_set(
            pairs,
            args.operands[0],
            references=references(),
            progress=progress.within(),
            rate=args.number("rate") or None,
        )
        progress.report(100)
    finally:
        progress.end()
    if as_json:
        console.out(pretty({"restored": len(pairs)}))
    elif not args.flag("quiet"):
        console.out(f"{len(pairs)} disks restored.\n")


def _planned(pair: DiskRestore) -> RestorePlan:
    from qcowlib.jobs.backup import plan_restore

    return plan_restore(
        pair.increment, pair.target, format=pair.format, target_format=pair.target_format, references=references()
    )


def _finish(args: Args, console: Console, *, as_json: bool) -> None:
    from qcowlib.jobs.backup_set import finish_set

    ending = finish_set(args.operands[0], references=references())
    if as_json:
        console.out(pretty({"journal": args.operands[0], "result": ending}))
    elif not args.flag("quiet"):
        console.out("Nothing is left to do.\n" if ending == "nothing" else f"The set was {ending}.\n")
