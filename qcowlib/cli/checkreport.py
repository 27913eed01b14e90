# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The report of ``check --report``: every finding, before and after a repair, with where it is and whose.

Invariant: the state before is looked at and written down before anything is
changed.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from qcowlib.cli.console import Failure
from qcowlib.cli.opening import references
from qcowlib.errors import Error, printable
from qcowlib.image import open as open_image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qcowlib.cli.names import ImageRef
    from qcowlib.qcow2.check import Report
    from qcowlib.qcow2.references import Finding

__all__ = ["write_report"]


def write_report(path: str, ref: ImageRef, examine: Callable[[str | None], Report], level: str | None) -> Report:
    """Check by *examine*, repair if there is a *level*, and write what was found to *path*; returns the last report.

    Raises: :class:`Failure`.
    """
    before = examine(None)
    content: dict[str, object] = {"filename": ref.text, "before": _state(before, _places(ref, before.findings))}
    _write(path, content)
    if level is None:
        return before
    after = examine(level)
    content["repair"] = level
    content["repairs"] = [_finding(finding, {}) for finding in after.repairs]
    content["after"] = _state(after, _places(ref, after.findings))
    _write(path, content)
    return after


def _write(path: str, content: dict[str, object]) -> None:
    text = json.dumps(content, indent=4) + "\n"
    try:
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError) as error:
        raise Failure(f"Could not write '{printable(path)}': {error}") from None


def _places(ref: ImageRef, findings: Sequence[Finding]) -> dict[int, int]:
    """Return the guest offset of the clusters that findings are about, by host offset, as far as the map tells."""
    wanted = sorted({one.host_offset for one in findings if one.host_offset is not None and one.guest_offset is None})
    found: dict[int, int] = {}
    if not wanted:
        return found
    try:
        with open_image(ref.path, format="qcow2", references=references(), backing=False, force_share=True) as image:
            for extent in image.extents():
                if extent.kind in ("data", "sparse") and extent.offset is not None:
                    found.update(_inside(wanted, extent.offset, extent.length, extent.start))
    except Error:
        # What cannot be opened or mapped has no guest offsets to tell.
        return found
    return found


def _inside(wanted: list[int], host: int, length: int, guest: int) -> dict[int, int]:
    from bisect import bisect_left

    first, last = bisect_left(wanted, host), bisect_left(wanted, host + length)
    return {place: guest + place - host for place in wanted[first:last]}


def _finding(finding: Finding, places: dict[int, int]) -> dict[str, object]:
    guest = finding.guest_offset
    if guest is None and finding.host_offset is not None:
        guest = places.get(finding.host_offset)
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "message": finding.message,
        "host-offset": finding.host_offset,
        "guest-offset": guest,
        "owner": finding.owner,
    }


def _state(report: Report, places: dict[int, int]) -> dict[str, object]:
    return {
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "check-errors": report.check_errors,
        "suppressed": report.suppressed,
        "findings": [_finding(finding, places) for finding in report.findings],
    }
