# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool demo`` with its last part: three hosts on one pool; see :mod:`.demo`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from storage_pool.cli.cmd_demo import present

if TYPE_CHECKING:
    from storage_pool.cli.hosting import Session

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_parsers"]


def add_parsers(subjects: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "show a pool at work in a temporary directory, on a volume group where root can make one, and three hosts"
    parser = subjects.add_parser("demo", parents=[common], help=text, description=text)
    parser.add_argument("--directory", metavar="DIR", help="where the temporary directory is made")
    parser.set_defaults(run=_run)


def _run(session: Session) -> int:
    from spm.cli.demo import hosts_demo
    from storage_pool.cli.demo import run_demo

    return present(session, run_demo, hosts_demo)
