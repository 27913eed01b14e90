# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The command ``qpool``: storage domains and what is in them.

Invariant: whatever happens, the user sees one clear line and an exit status
(0 success, 1 failure, 2 usage, 3 something was found wrong), never a
traceback (``QCOW_DEBUG=1`` shows it).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from qcowlib.errors import Error
from storage_pool.cli import cmd_demo, cmd_disk, cmd_domain, cmd_exchange, cmd_pool
from storage_pool.cli.hosting import Session
from storage_pool.cli.output import Output

if TYPE_CHECKING:
    from storage_pool.process import ProcessRunner
    from storage_pool.token import SpmToken

    class Subject(Protocol):
        """What each module of a subject has."""

        def add_parsers(
            self, subjects: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
        ) -> None: ...


__all__ = ["MODULES", "entry", "main", "make_parser"]

MODULES: tuple[Subject, ...] = (cmd_domain, cmd_disk, cmd_exchange, cmd_pool, cmd_demo)


def entry() -> int:
    """Run the command with the arguments of the process."""
    return main(sys.argv[1:])


def make_parser(modules: Iterable[Subject]) -> argparse.ArgumentParser:
    """Return the parser of the command with these subjects."""
    parser = argparse.ArgumentParser(prog="qpool", description="Storage domains of RHV and oVirt.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", choices=("human", "json"), default="human", help="how to print the answer")
    common.add_argument(
        "--device", action="append", metavar="DEV", help="a device that LVM may see; all that is configured by default"
    )
    common.add_argument("--no-activation", action="store_true", help="reach logical volumes by their extents")
    common.add_argument("--lock", metavar="FILE", default="/run/lock/qpool.lock", help="who changes a pool holds it")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for module in modules:
        module.add_parsers(subjects, common)
    return parser


def main(
    argv: Sequence[str],
    modules: Iterable[Subject] = MODULES,
    *,
    token: SpmToken | None = None,
    runner: ProcessRunner | None = None,
) -> int:
    """Run one command line; returns the exit status.

    *modules* are the subjects that there are.  With *token* changes are made by
    this right instead of the lock of this host, and programs run by *runner*.
    """
    arguments = make_parser(modules).parse_args(argv)
    arguments.held, arguments.runner = token, runner
    output = Output(arguments.output == "json")
    try:
        with Session(arguments, output) as session:
            status: int = arguments.run(session)
        output.flush()
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return 130
    except Error as error:
        return _fail(error, str(error), error.hint)
    except OSError as error:
        return _fail(error, f"{error.filename or 'qpool'}: {error.strerror}", None)
    return status


def _fail(error: Exception, text: str, hint: str | None) -> int:
    if os.environ.get("QCOW_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    print(f"qpool: {text}", file=sys.stderr)
    if hint:
        print(hint, file=sys.stderr)
    return 1
