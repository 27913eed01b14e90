# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Writes completion files and the manual page of ``qpool``, from its own parser; a test says when that is due.

Usage: ``python docs/make_qpool.py [FOLDER]``, by default the source tree.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Help is wrapped by what a terminal has; here always the same.
os.environ["COLUMNS"] = "100"
sys.path.insert(0, str(ROOT))

import shtab  # noqa: E402 - behind the path
from argparse_manpage.manpage import Manpage  # type: ignore[import-untyped]  # noqa: E402

from spm.cli.main import SUBJECTS  # noqa: E402
from storage_pool.cli.main import make_parser  # noqa: E402

_HEAD = '.\\" SPDX-FileCopyrightText: 2026 The qcowlib authors\n.\\" SPDX-License-Identifier: Apache-2.0\n'


def manual() -> str:
    """Return the manual page, without the day on which it was made."""
    lines = str(Manpage(make_parser(SUBJECTS))).splitlines()
    lines[0] = '.TH QPOOL 1 "" "qcowlib" "User Commands"'
    lines[2] = "qpool \\- storage domains, volumes and pools of RHV and oVirt"
    return _HEAD + "\n".join(line.rstrip() for line in lines) + "\n"


def completion(shell: str) -> str:
    """Return the completion file for *shell*."""
    text: str = shtab.complete(make_parser(SUBJECTS), shell=shell)
    return "\n".join(line.rstrip() for line in text.rstrip("\n").splitlines()) + "\n"


def main(folder: Path) -> None:
    """Write all files below *folder*."""
    for name, text in (
        ("completions/qpool", completion("bash")),
        ("completions/_qpool", completion("zsh")),
        ("docs/qpool.1", manual()),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
