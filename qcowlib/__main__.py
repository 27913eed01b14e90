# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m qcowlib`` is the command ``qcow``."""

from __future__ import annotations

import sys

from qcowlib.cli.main import entry

if __name__ == "__main__":
    sys.exit(entry())
