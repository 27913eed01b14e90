# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``demo``: show the library at work in a temporary directory; see :mod:`.demo`.

Invariant: nothing outside that directory changes.
"""

from __future__ import annotations

from qcowlib.cli import options
from qcowlib.cli.console import Console, usage_failure
from qcowlib.cli.parser import Args, Command, Option

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "demo",
    "Show the library at work on files of this machine.",
    "",
    (
        options.HELP,
        options.OUTPUT_EXTRA,
        Option("", "directory", "directory", "where the temporary directory is made", meta="DIR", extra=True),
    ),
    "demo --output=json",
)


def run(args: Args, console: Console) -> int:
    """Run ``demo``; 1 if a step found a problem."""
    if args.operands:
        raise usage_failure(f"Unexpected argument: {args.operands[0]}")

    def write(text: str) -> None:
        console.out(text)
        console.flush()

    from qcowlib.cli.demo import run_demo

    return run_demo(write, as_json=options.wants_json(args), directory=args.text("directory"))
