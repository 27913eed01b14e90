# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The API reference is that of this source, and holds everything that is public."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qcowlib.aio
import qcowlib.api
import qcowlib.errors

pytestmark = pytest.mark.bare

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/api.md").read_text()


def test_reference_is_current() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "docs/make_api.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", [qcowlib.api, qcowlib.errors, qcowlib.aio], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module: object) -> None:
    for name in module.__all__:
        assert f"#### {name}\n" in TEXT, name


def test_every_public_method_of_an_image_has_a_text() -> None:
    section = TEXT[TEXT.index("#### Image\n") : TEXT.index("## Errors")]
    for name in dir(qcowlib.api.Image):
        if not name.startswith("_") and name not in ("mode", "path"):
            assert f"`{name}(" in section or f"`{name}:" in section, name
