# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool demo``: a whole pool at work in a temporary directory; see :mod:`.demo`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from storage_pool.cli.hosting import Session

if TYPE_CHECKING:
    from storage_pool.cli.demo import Result

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_parsers", "present"]

Demo = Callable[["Callable[[Result], None]", "str | None"], "list[Result]"]


def add_parsers(subjects: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "show a pool at work in a temporary directory, and on a volume group where root can make one"
    parser = subjects.add_parser("demo", parents=[common], help=text, description=text)
    parser.add_argument("--directory", metavar="DIR", help="where the temporary directory is made")
    parser.set_defaults(run=_run)


def _run(session: Session) -> int:
    from storage_pool.cli.demo import run_demo

    return present(session, run_demo)


def present(session: Session, *demos: Demo) -> int:
    """Run *demos* and print their steps as they end; returns 1 if one found a problem."""
    output = session.out

    def tell(result: Result) -> None:
        if not output.as_json:
            state = "ok" if result.problem is None else "PROBLEM"
            said = result.problem or result.text
            output.line(f"{result.seconds:7.2f} s  {state}  {result.kind}: {result.step}: {said}")
            output.flush()

    results = [result for demo in demos for result in demo(tell, session.args.directory)]
    problems = sum(result.problem is not None for result in results)
    seconds = round(sum(result.seconds for result in results), 3)
    if output.as_json:
        steps = [result._asdict() for result in results]
        output.document({"steps": steps, "seconds": seconds, "problems": problems})
    else:
        output.line(f"{seconds:.1f} s, {len(results)} steps, {problems} problems")
    return 1 if problems else 0
