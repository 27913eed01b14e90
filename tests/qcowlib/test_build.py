# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The tests run on the build they are meant for: the plain one, or the checked one with its sanitizers."""

from __future__ import annotations

import os
from pathlib import Path

from qcowlib import _extent

CHECKED = os.environ.get("QCOWLIB_CHECKED") == "1"


def test_compiled_modules_come_from_the_build_under_test(project_root: Path) -> None:
    place = Path(_extent.__file__).resolve()
    assert place.is_relative_to(project_root / "build/checked") == CHECKED


def test_sanitizers_are_loaded_in_the_checked_build_only() -> None:
    maps = Path("/proc/self/maps").read_text()
    assert ("libasan" in maps) == ("libubsan" in maps) == CHECKED
