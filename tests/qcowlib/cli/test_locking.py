# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``file.locking``: with ``off`` an image is opened although somebody has it, as by qemu-img."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

import pytest

from tests.qcowlib.cli.conftest import run_ours, run_real
from tests.qcowlib.qemu import QemuIo, qemu_img

pytestmark = pytest.mark.real("qemu-img", "qemu-io")

NODE = "driver=qcow2,file.driver=file,file.filename=a"


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (f"resize -q --image-opts {NODE} +1M", 1),
        (f"resize -q --image-opts {NODE},file.locking=on +1M", 1),
        (f"resize -q --image-opts {NODE},file.locking=auto +1M", 1),
        (f"resize -q --image-opts {NODE},file.locking=off +1M", 0),
        (f"map --image-opts {NODE},file.locking=off", 0),
        (f"info --image-opts {NODE},file.locking=off", 0),
        (f"check -q --image-opts {NODE},file.locking=off", 0),
        (
            "check -q "
            + shlex.quote('json:{"driver": "qcow2", "file": {"driver": "file", "filename": "a", "locking": "off"}}'),
            0,
        ),
        (f"snapshot -c s --image-opts {NODE},file.locking=off", 0),
        (f"bitmap --add --image-opts {NODE},file.locking=off b", 0),
        (f"amend --image-opts -o lazy_refcounts=on {NODE},file.locking=off", 0),
    ],
)
def test_without_locking_an_image_in_use_is_opened(tmp_path: Path, line: str, status: int) -> None:
    for run in (run_real, run_ours):
        where = tmp_path / run.__name__
        where.mkdir()
        qemu_img("create", "-q", "-f", "qcow2", where / "a", "1M")
        with contextlib.closing(QemuIo(where / "a")):
            assert run(shlex.split(line), where).status == status, run.__name__
