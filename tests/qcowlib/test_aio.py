# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The asyncio facade: the same names, and many tasks on one image."""

from __future__ import annotations

import ast
import asyncio
import inspect
import random
import subprocess
from pathlib import Path

import pytest

import qcowlib
from qcowlib import aio

pytestmark = pytest.mark.real("qemu-img")

SIZE = 4 << 20
#: What makes no sense on a loop, or is a building block of jobs, which run in a thread.
SYNC_ONLY = {"empty", "file", "map", "preadinto_many", "pwrite_many", "read_runs", "write_compressed"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)
    return path


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_both_facades_have_the_same_names_and_arguments() -> None:
    shared = public(qcowlib.Image) - SYNC_ONLY
    assert public(aio.Image) >= shared
    for name in public(aio.Image):
        ours, theirs = getattr(aio.Image, name), getattr(qcowlib.Image, name)
        if callable(ours):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
    assert list(inspect.signature(aio.open).parameters) == list(inspect.signature(qcowlib.open).parameters)


def test_many_tasks_on_one_image_lose_nothing(path: Path) -> None:
    model = bytearray(SIZE)

    async def worker(image: aio.Image, number: int) -> None:
        rng = random.Random(number)
        # Each task has its own 512-byte sectors of every cluster.
        for _ in range(40):
            offset = (rng.randrange(SIZE // 4096) * 8 + number) * 512
            data = rng.randbytes(512)
            model[offset : offset + 512] = data
            assert await image.pwrite(data, offset) == 512
            assert await image.pread(512, offset) == data
            if rng.random() < 0.1:
                await image.flush()

    async def main() -> None:
        async with await aio.open(path, "r+") as image:
            await asyncio.gather(*(worker(image, number) for number in range(8)))
            assert await image.pread(SIZE + 5, 0) == bytes(model)
            buffer = bytearray(100)
            assert await image.preadinto(buffer, SIZE - 10) == 10
            kinds = {extent.kind async for extent in image.extents()}
            assert "data" in kinds

    asyncio.run(main())
    subprocess.run(["qemu-img", "check", path], check=True, capture_output=True)
    with qcowlib.open(path) as image:
        assert image.pread(SIZE, 0) == bytes(model)


def test_snapshots_and_resize_on_a_loop(path: Path) -> None:
    async def main() -> None:
        async with await aio.open(path, "r+") as image:
            await image.pwrite(b"one", 0)
            await image.create_snapshot("s")
            await image.pwrite(b"two", 0)
            await image.resize(2 * SIZE)
            await image.apply_snapshot("s")
            assert image.size == SIZE
            assert await image.pread(3, 0) == b"one"
            assert [entry.name for entry in await image.snapshots()] == ["s"]
            await image.delete_snapshot("s")
            with pytest.raises(qcowlib.OutOfRange):
                await image.pwrite(b"x", SIZE)

    asyncio.run(main())
    subprocess.run(["qemu-img", "check", path], check=True, capture_output=True)


def test_jobs_of_the_api_are_awaitable(path: Path, tmp_path: Path) -> None:
    async def main() -> None:
        await aio.convert(path, tmp_path / "copy")
        result = await aio.compare(path, tmp_path / "copy")
        assert result.verdict == "identical"

    assert {"convert", "compare", "flatten", "measure"} <= set(dir(aio))
    asyncio.run(main())


def test_every_public_name_exists() -> None:
    for name in qcowlib.api.__all__:
        assert getattr(qcowlib, name) is not None, name


def test_type_checkers_see_every_job() -> None:
    tree = ast.parse(Path(aio.__file__).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {ast.unparse(node.targets[0]) for block in blocks for node in block.body if isinstance(node, ast.Assign)}
    assert seen == aio._JOBS
