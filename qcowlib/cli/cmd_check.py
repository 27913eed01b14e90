# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``check``: is an image consistent, and repair it if asked.

Invariant: without ``-r`` nothing is written.  Exit status: 0 clean, 1 the
check failed, 2 corruptions, 3 leaks only, 63 the format has nothing to check.
"""

from __future__ import annotations

import os

from qcowlib.cli import options, several
from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.names import ImageRef, image_ref
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import check_backing, luks_secret, open_failure, recognise_luks, secret_of
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from qcowlib.cli.jsonout import Json
    from qcowlib.qcow2.check import Report
    from qcowlib.storage.file import FileStorage

__all__ = ["COMMAND", "NO_CHECKS", "run"]

#: The exit status for a format without checks.
NO_CHECKS = 63
#: Findings beyond this many are counted, not printed.
_LIMIT = 1 << 16


def _level(text: str, _console: Console) -> str:
    if text not in ("leaks", "all"):
        raise usage_failure(f"Unknown option value for -r (expecting 'leaks' or 'all'): {text}")
    return text


COMMAND = Command(
    "check",
    "Check images for consistency; exit status 0 clean, 2 corrupt, 3 leaked clusters only.",
    "FILE...",
    (
        options.HELP,
        options.FORMAT_LONG,
        Option("r", "repair", "repair", "repair leaks, or all", meta="WHAT", convert=_level),
        options.SOURCE_CACHE,
        options.QUIET,
        options.OUTPUT,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.FORCE_SHARE,
        Option(
            "",
            "report",
            "report",
            "write all findings, before and after, to FILE",
            meta="FILE",
            extra=True,
        ),
        several.JOBS,
        several.RECURSIVE,
    ),
    "check -r leaks disk.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``check``."""
    if not args.operands or (len(args.operands) > 1 and console.prog.startswith("qemu-img")):
        raise usage_failure("Expecting one image file name")
    options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    cache = options.cache_mode(args, source=True)
    if args.flag("report") and (several.is_many(args, console) or len(args.operands) > 1):
        raise usage_failure("--report is for one FILE")
    if several.is_many(args, console):
        return _many(args, cache, secrets, console)
    more = len(args.operands) > 1
    worst = 0
    for name in args.operands:
        try:
            ref = image_ref(name, args.text("format"), image_opts=args.flag("image-opts"))
            if more and not options.wants_json(args) and not args.flag("quiet"):
                console.out(f"{name}:\n")
            status = _one(ref, args, cache, secrets, console)
        except Failure as failure:
            if not more:
                raise
            status = console.fail(failure)
        worst = _worse(worst, status)
    return worst


def _worse(one: int, other: int) -> int:
    """Return the more serious of two exit statuses: a failed check, corruption, leaks, no checks."""
    order = (0, NO_CHECKS, 3, 2, 1)
    return max(one, other, key=order.index)


def _many(args: Args, cache: str, secrets: Mapping[str, bytes], console: Console) -> int:
    def action(name: str) -> several.Answer:
        ref = image_ref(name, args.text("format"), image_opts=args.flag("image-opts"))
        try:
            report = _examine(ref, args, cache, secrets, args.text("repair"))
        except Failure as failure:
            if failure.code != NO_CHECKS:
                raise
            return several.Answer("without checks", failure.messages[0], {}, NO_CHECKS)
        found = _json(report, ref)
        if report.failure or report.check_errors:
            return several.Answer("failed", "the check failed", found, 1)
        counted = [
            f"{count} {what}"
            for count, what in (
                (report.corruptions, "errors"),
                (report.leaks, "leaked clusters"),
                (report.corruptions_fixed, "errors repaired"),
                (report.leaks_fixed, "leaked clusters repaired"),
            )
            if count
        ]
        kind = {2: "corrupt", 3: "with leaks"}.get(report.exit_status, "clean")
        return several.Answer(kind, ", ".join(counted) or "no errors", found, report.exit_status)

    return several.run_many(args, console, action, as_json=options.wants_json(args), worse=_worse)


def _one(ref: ImageRef, args: Args, cache: str, secrets: Mapping[str, bytes], console: Console) -> int:
    if args.text("report") is not None:
        from qcowlib.cli.checkreport import write_report

        def examine(level: str | None) -> Report:
            return _examine(ref, args, cache, secrets, level)

        report = write_report(args.text("report") or "", ref, examine, args.text("repair"))
    else:
        report = _examine(ref, args, cache, secrets, args.text("repair"))
    _print(report, ref, args, console)
    if report.failure:
        raise Failure(f"Check failed: {os.strerror(report.failure)}")
    if report.check_errors:
        raise Failure("Check failed")
    return report.exit_status


def _examine(ref: ImageRef, args: Args, cache: str, secrets: Mapping[str, bytes], level: str | None) -> Report:
    """Check the image, or repair it.  Raises :class:`Failure`."""
    from qcowlib.qcow2.check import check

    storage = _open(ref, args, cache, secrets)
    if storage is None:
        raise Failure("This image format does not support checks", code=NO_CHECKS)
    try:
        if level is None:
            return check(storage, limit=_LIMIT)
        from qcowlib.qcow2.repair import repair

        return repair(storage, "all" if level == "all" else "leaks", limit=_LIMIT)
    except Error as error:
        raise open_failure(ref.text, error) from None
    finally:
        storage.close()


def _open(ref: ImageRef, args: Args, cache: str, secrets: Mapping[str, bytes]) -> FileStorage | None:
    """Open and lock the file of *ref*; None if its format has no checks."""
    from qcowlib.chain import probe_format
    from qcowlib.qcow2.check import read_header
    from qcowlib.storage.file import FileStorage
    from qcowlib.storage.imagelock import lock_image

    writable, shared = args.flag("repair"), args.flag("force-share")
    if writable and shared:
        raise Failure(f"Could not open '{ref.text}': force-share=on can only be used with read-only images")
    try:
        storage = FileStorage.open(ref.plain_path, writable=writable, cache=cache)
        try:
            recognise_luks(ref, storage)
            if ref.format == "luks":
                luks_secret(ref, secrets)
            if (ref.format or probe_format(storage)) != "qcow2":
                storage.close()
                return None
            access = "force_share" if shared else "write" if writable else "read"
            if ref.locking:
                lock_image(storage.fileno(), storage.name, access)  # type: ignore[arg-type]
            header = read_header(storage, writable=writable)
            check_backing(ref, header)
            if header.crypt_method and secret_of(ref, secrets) is None:
                raise Failure(f"Could not open '{ref.text}': Parameter 'encrypt.key-secret' is required for cipher")
        except BaseException:
            storage.close()
            raise
    except Error as error:
        raise open_failure(ref.text, error) from None
    return storage


def _print(report: Report, ref: ImageRef, args: Args, console: Console) -> None:
    for finding in (*report.repairs, *report.findings):
        prefix = f"{console.prog}: " if finding.prefixed else ""
        console.err(f"{prefix}{finding.message}\n")
    if report.suppressed:
        console.err(f"{report.suppressed} more findings are not shown\n")
    if args.flag("quiet"):
        return
    as_json = options.wants_json(args)
    if not as_json and (report.leaks_fixed or report.corruptions_fixed):
        console.out(
            "The following inconsistencies were found and repaired:\n\n"
            f"    {report.leaks_fixed} leaked clusters\n    {report.corruptions_fixed} corruptions\n\n"
            "Double checking the fixed image now...\n"
        )
    if report.failure:
        return
    console.out(pretty(_json(report, ref)) if as_json else _human(report))


_COUNTS = (
    "image_end_offset",
    "corruptions",
    "leaks",
    "corruptions_fixed",
    "leaks_fixed",
    "total_clusters",
    "allocated_clusters",
    "fragmented_clusters",
    "compressed_clusters",
)


def _json(report: Report, ref: ImageRef) -> dict[str, Json]:
    result: dict[str, Json] = {"filename": ref.text, "format": "qcow2", "check-errors": report.check_errors}
    for name in _COUNTS:
        count: int = getattr(report, name)
        if count:
            result[name.replace("_", "-")] = count
    return result


def _human(report: Report) -> str:
    parts = []
    if not (report.corruptions or report.leaks or report.check_errors):
        parts.append("No errors were found on the image.\n")
    if report.corruptions:
        parts.append(
            f"\n{report.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it.\n"
        )
    if report.leaks:
        parts.append(
            f"\n{report.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data.\n"
        )
    if report.check_errors:
        parts.append(f"\n{report.check_errors} internal errors have occurred during the check.\n")
    total, allocated = report.total_clusters, report.allocated_clusters
    if total and allocated:
        parts.append(
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated, "
            f"{report.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{report.compressed_clusters * 100 / allocated:.2f}% compressed clusters\n"
        )
    if report.image_end_offset:
        parts.append(f"Image end offset: {report.image_end_offset}\n")
    return "".join(parts)
