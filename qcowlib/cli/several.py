# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One command over many images: folders, workers, one stream of answers, one summary.

Invariant: a line (or a JSON object on a line of its own) for each image in
their order, as soon as it is known, and the summary last; an image that fails
is a line too.
"""

from __future__ import annotations

import os

from qcowlib.cli.console import Console, Failure
from qcowlib.cli.jsonout import compact
from qcowlib.cli.parser import Args, Option
from qcowlib.errors import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NamedTuple

    from qcowlib.cli.jsonout import Json
else:
    from qcowlib.records import NamedTuple

__all__ = ["JOBS", "RECURSIVE", "Answer", "is_many", "run_many"]


def _count(text: str, _console: Console) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 16):
        raise Failure("-j takes a number of workers from 1 to 16")
    return int(text[:9])


JOBS = Option("j", "jobs", "jobs", "several images at a time, one line each", meta="COUNT", convert=_count, extra=True)
RECURSIVE = Option("R", "recursive", "recursive", "look into folders in folders too", extra=True)


class Answer(NamedTuple):
    """What is said of one image: under *kind* it counts in the summary, *status* is that of the command."""

    kind: str
    text: str
    found: dict[str, Json]
    status: int = 0


def is_many(args: Args, console: Console) -> bool:
    """Return whether the line asks for this form: a folder, workers or ``-R``; never under qemu-img's name."""
    if console.prog.startswith("qemu-img"):
        return False
    if args.flag("jobs") or args.flag("recursive"):
        return True
    return any(os.path.isdir(name) for name in args.operands)  # noqa: PTH112


def run_many(
    args: Args,
    console: Console,
    action: Callable[[str], Answer],
    *,
    as_json: bool,
    worse: Callable[[int, int], int] = max,
) -> int:
    """Run *action* on every image that the operands name; returns the worst status (1 for what failed)."""
    from qcowlib.jobs.many import images_in, many

    def attempt(path: str) -> Answer:
        try:
            return action(path)
        except Failure as failure:
            message = "; ".join(printable(text) for text in failure.messages)
            return Answer("failed", message, {"error": message}, failure.code)

    counts: dict[str, int] = {}
    worst = 0
    paths = images_in(args.operands, recursive=args.flag("recursive"))
    for path, answer, error in many(attempt, paths, workers=args.number("jobs")):
        if answer is None:
            message = printable(str(error))
            answer = Answer("failed", message, {"error": message}, 1)
        counts[answer.kind] = counts.get(answer.kind, 0) + 1
        worst = worse(worst, answer.status)
        if as_json:
            console.out(compact({"filename": path, "result": answer.kind, **answer.found}) + "\n")
        else:
            console.out(f"{printable(path)}: {answer.text}\n")
    total = sum(counts.values())
    if as_json:
        console.out(compact({"summary": {"images": total, **dict(sorted(counts.items()))}}) + "\n")
    else:
        parts = [f"{count} {kind}" for kind, count in sorted(counts.items())]
        console.out(f"{total} image{'s' * (total != 1)}{': ' * bool(parts)}{', '.join(parts)}\n")
    return worst
