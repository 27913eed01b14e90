# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The images of the benchmarks are what they claim; qemu-img is the judge."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import images
import pytest

pytestmark = [pytest.mark.bare, pytest.mark.real("qemu-img")]


def qemu_check(path: Path) -> dict[str, int]:
    command = ["qemu-img", "check", "--output=json", path]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)  # type: ignore[no-any-return]


def test_scattered_image_is_clean_and_fragmented(tmp_path: Path) -> None:
    images.scattered_image(tmp_path / "a.qcow2", 1 << 30, 200)
    report = qemu_check(tmp_path / "a.qcow2")
    assert report["allocated-clusters"] == 200
    assert report["fragmented-clusters"] > 150
    assert "leaks" not in report and "corruptions" not in report


def test_full_image_is_clean_and_contiguous(tmp_path: Path) -> None:
    images.full_image(tmp_path / "a.qcow2", 1 << 30)
    report = qemu_check(tmp_path / "a.qcow2")
    assert report["allocated-clusters"] == report["total-clusters"] == (1 << 30) // images.CLUSTER
    assert "fragmented-clusters" not in report
    assert "leaks" not in report and "corruptions" not in report


def test_realistic_image_has_data_and_holes(tmp_path: Path) -> None:
    images.realistic_raw(tmp_path / "a.raw", 16 << 20)
    status = (tmp_path / "a.raw").stat()
    assert status.st_size == 16 << 20
    assert 4 << 20 < status.st_blocks * 512 < 16 << 20
