# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Compiled code and Python state the same masks and kinds of runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qcowlib import driver
from qcowlib.ondisk import constants

pytestmark = pytest.mark.bare

PXD = (Path(__file__).resolve().parents[2] / "qcowlib/_ondisk.pxd").read_text()

MASKS = {name: int(value, 16) for name, value in re.findall(r"#define (QC_\w+)\s+(0x[0-9A-F]+)ULL", PXD)}
KINDS = {name: int(value) for name, value in re.findall(r"^    RUN_(\w+) = (\d+)$", PXD, re.MULTILINE)}

# Where the Python name is longer.
RENAMED = {"RT_OFFSET_MASK": "REFCOUNT_TABLE_OFFSET_MASK", "RT_RESERVED": "REFCOUNT_TABLE_RESERVED"}


@pytest.mark.parametrize("name", MASKS)
def test_mask_equals_the_constant_of_python(name: str) -> None:
    plain = name.removeprefix("QC_")
    python_name = RENAMED.get(plain, plain)
    module = driver if hasattr(driver, python_name) and not hasattr(constants, python_name) else constants
    assert getattr(module, python_name) == MASKS[name]


@pytest.mark.parametrize("name", KINDS)
def test_kind_of_run_equals_the_constant_of_python(name: str) -> None:
    assert getattr(driver, name) == KINDS[name]


def test_masks_and_kinds_were_found() -> None:
    assert {"QC_OFFSET_MASK", "QC_L1_RESERVED", "QC_L2_RESERVED", "QC_COPIED"} <= MASKS.keys()
    assert {"HOLE", "ZERO", "DATA", "COMPRESSED", "END"} <= KINDS.keys()
