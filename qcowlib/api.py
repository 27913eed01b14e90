# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The synchronous facade: everything that ``import qcowlib`` gives.

Invariant: names only.  What they do is in the module each comes from.
"""

from __future__ import annotations

from qcowlib.gate import deny_all, directories, qemu_like, same_directory
from qcowlib.image import Image, open

__all__ = ["Image", "deny_all", "directories", "open", "qemu_like", "same_directory"]
