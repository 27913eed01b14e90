# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Random sources, and what qemu-img says of a result."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import qcowlib

#: (start, length, data, zero, present, offset)
Row = list[int | bool | None]

SOURCE_OPTIONS = ["", "cluster_size=512", "cluster_size=4k", "extended_l2=on", "cluster_size=2M", "compat=0.10"]


def qemu_img(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", *map(str, words)], check=check, capture_output=True, text=True)


def allocation(path: Path, *, offsets: bool) -> list[Row]:
    """The map of *path*; holes of the file inside data count as data: they are the file system's."""
    rows: list[Row] = []
    for entry in json.loads(qemu_img("map", "--output=json", path).stdout):
        row: Row = [entry.get(key) for key in ("start", "length", "data", "zero", "present", "offset")]
        row[3] = row[3] and not row[2]
        if not offsets:
            row[5] = None
        last = rows[-1] if rows else None
        if last is not None and last[2:5] == row[2:5] and _follows(last, row):
            last[1] = int(last[1] or 0) + int(row[1] or 0)
        else:
            rows.append(row)
    return rows


def _follows(last: Row, row: Row) -> bool:
    if last[5] is None or row[5] is None:
        return last[5] is row[5]
    return int(last[5]) + int(last[1] or 0) == row[5]


def _content(rng: random.Random, length: int) -> bytes:
    return rng.randbytes(length) if rng.random() < 0.5 else (b"abcd" * (length // 4 + 1))[:length]


def raw_image(rng: random.Random, path: Path, size: int) -> None:
    """A raw file of *size* bytes with data, written zeros and holes."""
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(rng.randrange(12)):
            offset = rng.randrange(size) // 512 * 512
            length = min(size - offset, rng.choice([512, 4096, 8192, 19968, 65536, 300 << 10, 3 << 20]))
            file.seek(offset)
            file.write(_content(rng, length) if rng.random() < 0.75 else bytes(length))


def qcow2_image(rng: random.Random, path: Path, size: int, options: str, base: Path | None) -> None:
    """A QCOW2 image with data, written zeros, zero clusters and holes."""
    words: list[object] = ["create", "-q", "-f", "qcow2"]
    words += ["-o", options] if options else []
    words += ["-b", base, "-F", "raw"] if base is not None else []
    qemu_img(*words, path, size)
    with qcowlib.open(path, "r+") as image:
        for _ in range(rng.randrange(14)):
            offset = rng.randrange(size) // 512 * 512
            length = min(size - offset, rng.choice([512, 4096, 8192, 65536, 130 << 10, 1 << 20]))
            choice = rng.random()
            if choice < 0.7:
                image.pwrite(_content(rng, length) if choice < 0.55 else bytes(length), offset)
            elif choice < 0.85:
                image.zero(length, offset, unmap=rng.random() < 0.5)
            else:
                image.discard(length, offset)


def make_source(rng: random.Random, folder: Path, kind: str, size: int) -> Path:
    """Make ``src`` of a kind: raw, qcow2, or a chain over the raw file ``base``."""
    path, base = folder / "src", folder / "base"
    path.unlink(missing_ok=True)
    if kind == "raw":
        raw_image(rng, path, size)
        return path
    if kind == "chain":
        raw_image(rng, base, rng.choice([size, size // 1024 * 512 + 512, size + (1 << 20)]))
    qcow2_image(rng, path, size, rng.choice(SOURCE_OPTIONS), base if kind == "chain" else None)
    return path
