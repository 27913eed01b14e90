# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The command ``qpool`` with all its subjects: those of ``storage_pool``, and ``host``.

Invariant: as :mod:`storage_pool.cli.main`.
"""

from __future__ import annotations

import sys

from spm.cli import cmd_demo, cmd_host
from storage_pool.cli import cmd_demo as pool_demo
from storage_pool.cli.main import MODULES, main

__all__ = ["SUBJECTS", "entry"]

#: All subjects of the command.
SUBJECTS = (*(module for module in MODULES if module is not pool_demo), cmd_host, cmd_demo)


def entry() -> int:
    """Run the command with the arguments of the process."""
    return main(sys.argv[1:], SUBJECTS)


if __name__ == "__main__":
    sys.exit(entry())
