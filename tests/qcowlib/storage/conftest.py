# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Loop devices for the storage tests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Callable[[int, int], str]]:
    """Give a function (size, sector size) -> path of a new zeroed block device."""
    attached: list[str] = []

    def attach(size: int, sector: int) -> str:
        backing = tmp_path / f"loop{len(attached)}"
        with backing.open("wb") as file:
            file.truncate(size)
        command = ["losetup", "--find", "--show", "--sector-size", str(sector), str(backing)]
        device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        attached.append(device)
        return device

    yield attach
    for device in attached:
        subprocess.run(["losetup", "--detach", device], check=True)
