# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""dd against qemu-img dd: the same content for the same blocks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qcowlib.jobs.dd import dd
from tests.qcowlib.jobs.samples import make_source, qemu_img

MiB = 1 << 20


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("blocks", [(512, None, 0), (65536, 20, 3), (1000, 777, 5), (MiB, 1, 1), (4096, None, 9999)])
def test_content_is_that_of_qemu_img(tmp_path: Path, format: str, blocks: tuple[int, int | None, int]) -> None:
    block, count, skip = blocks
    source = make_source(random.Random(str(blocks)), tmp_path, "chain", 5 * MiB + 1536)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    words = [f"bs={block}", f"skip={skip}"] + ([f"count={count}"] if count is not None else [])
    qemu_img("dd", "-f", "qcow2", "-O", format, *words, f"if={source}", f"of={theirs}")
    size = dd(source, ours, format=format, block_size=block, count=count, skip=skip)
    answer = qemu_img("compare", "-f", format, "-F", format, theirs, ours)
    assert answer.stdout == "Images are identical.\n"
    assert size <= (0 if skip * block >= (count or 1 << 40) * block else 5 * MiB + 1536)
